"""Write the fields of MeshSettings into docs/configuration.md, or check that they are up to date.

`python docs/generate_configuration.py` writes; with `--check` it compares and exits 1 on a
difference.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expertmesh.services.settings import MeshSettings

PAGE = Path(__file__).resolve().parent / "configuration.md"
BEGIN, END = "<!-- generated fields -->", "<!-- end of generated fields -->"
WIDTH = 110
UNITS = {
    "calls_per_s": "calls/s",
    "_per_s": "bytes/s",
    "_s": "s",
    "_gpus": "GPUs",
    "_cpus": "CPUs",
    "_running": "requests",
    "_waiting": "requests",
    "_calls": "calls",
}
UNITS |= {end: end.strip("_") for end in ("_bytes", "_rows", "_tokens", "groups", "threads")}
BOUNDS = {"exclusiveMinimum": "above", "minimum": "at least", "maximum": "at most"}


def sections(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted path, schema) of a model and all models inside it."""
    yield path, schema
    for name, field in schema["properties"].items():
        if "$ref" in field:
            inner = schema["$defs"][field["$ref"].rpartition("/")[2]] | {"$defs": schema["$defs"]}
            yield from sections(inner, f"{path}.{name}".strip("."))


def describe(name: str, field: dict[str, Any]) -> str:
    """One field: default, unit, what is allowed, what it does."""
    unit = next((f" {unit}" for end, unit in UNITS.items() if name.endswith(end)), "")
    default = (
        f"default `{json.dumps(field['default'])}`{unit}" if "default" in field else "required"
    )
    choices = ", ".join(f"`{choice}`" for choice in field.get("enum", ()))
    limits = ", ".join(f"{text} {field[key]}" for key, text in BOUNDS.items() if key in field)
    facts = "; ".join(fact for fact in (default, choices, limits) if fact)
    text = f"- `{name}` ({facts}). {' '.join(field['description'].split())}"
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def render() -> str:
    """All fields, section by section."""
    parts = []
    for path, schema in sections(MeshSettings.model_json_schema()):
        own = {n: f for n, f in schema["properties"].items() if "$ref" not in f}
        title = f"### `{path}`" if path else "### Top level"
        about = " ".join(schema["description"].split())
        lines = [describe(name, field) for name, field in own.items()]
        parts.append("\n".join([title, "", about, "", *lines, ""]))
    return "\n".join(parts)


def updated(page: str) -> str:
    """The page with its generated part made anew."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{render()}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    page = PAGE.read_text("utf-8")
    if not parser.parse_args().check:
        PAGE.write_text(updated(page), "utf-8")
    elif page != updated(page):
        sys.exit(f"stale: {PAGE.name}; run `python docs/generate_configuration.py` and commit it")


if __name__ == "__main__":
    main()
