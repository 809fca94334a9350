"""The pages say what the code does: fields, errors, metrics, spans, RPCs, commands, links."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.summary import with_table
from chaos.drills import DRILLS
from chaos.results import with_tables
from tests.checkpoints import FAMILIES

from expertmesh.runtime import errors
from expertmesh.runtime.metrics import Metrics
from expertmesh.services import cli
from expertmesh.services.settings import MeshSettings
from expertmesh.v1 import control_pb2, expert_pb2, generate_pb2, placement_pb2, router_pb2

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "ARCHITECTURE.md"]
SOURCES = (
    *("services", "router", "experts", "protos", "tests", "docs", "examples"),
    *("chaos", "benchmarks", "k8s", "docker"),
)
SUFFIXES = (".py", ".md", ".proto", ".toml", ".txt", "/")
COMMON = "services/expertmesh/services/commands/common.py"
OUTSIDE = {"serve/"}
"""Directories named that are not in the repository."""
WIDTH = 110

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_SPAN = re.compile(r"(?:span|record|start)\(\s*(?:context, )?f?\"([a-z]+\.[\w{}]+)\"")


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text("utf-8")


def blocks(page: str, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    return [body for language, body in _FENCE.findall(page) if language in languages]


def code(page: str) -> list[str]:
    """Everything typeset as code: fenced lines, then inline pieces."""
    fenced = [line for _, body in _FENCE.findall(page) for line in body.splitlines()]
    return [*fenced, *_INLINE.findall(_FENCE.sub("", page))]


def table(page: str, first: str) -> list[list[str]]:
    """The rows of the table whose first heading is this, cells without backticks."""
    lines = page.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


def generator() -> Any:
    """docs/generate_configuration.py as a module."""
    path = ROOT / "docs/generate_configuration.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_configuration_is_generated_from_the_settings() -> None:
    command = [sys.executable, "docs/generate_configuration.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_stale_configuration_page_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, page = generator(), text_of("configuration.md")
    stale = tmp_path / "configuration.md"
    stale.write_text(page.replace("default `50051`", "default `1`"), "utf-8")
    monkeypatch.setattr(module, "PAGE", stale)
    monkeypatch.setattr(sys, "argv", ["generate", "--check"])
    with pytest.raises(SystemExit, match="stale"):
        module.main()
    monkeypatch.setattr(sys, "argv", ["generate"])
    module.main()
    assert stale.read_text("utf-8") == page


def dotted(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of all fields, sections apart."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_the_example_is_valid_and_complete() -> None:
    [example] = blocks(text_of("configuration.md"), "yaml")
    values = yaml.safe_load(example)
    settings = MeshSettings.model_validate(values)
    assert set(dotted(values)) == set(dotted(settings.model_dump()))


def transcripts() -> list[tuple[str, str]]:
    """(command, output) of every error example."""
    [session] = blocks(text_of("configuration.md"), "console")
    lines = session.splitlines()
    return list(zip(lines[::2], lines[1::2], strict=True))


@pytest.mark.parametrize(("command", "output"), transcripts())
def test_the_error_examples_are_real(
    command: str,
    output: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    before, _, args = command.removeprefix("$ ").partition("expertmesh ")
    if before:
        monkeypatch.setenv(*before.strip().split("=", 1))
    assert cli.main(args.split()) == cli.USER_ERROR
    assert capsys.readouterr().err.strip() == output


def error_classes(base: type[errors.ExpertMeshError]) -> Iterator[type[errors.ExpertMeshError]]:
    """All classes of runtime/errors.py."""
    if base.__module__ == errors.__name__:
        yield base
    for child in base.__subclasses__():
        yield from error_classes(child)


def test_every_error_is_in_the_table_with_its_code() -> None:
    rows = table(text_of("wire.md"), "class")
    assert {tuple(row[:4]) for row in rows} == {
        (kind.__name__, kind.code.name, kind.reason(), "yes" if kind.retryable else "no")
        for kind in error_classes(errors.ExpertMeshError)
    }
    assert all(row[4] for row in rows)


def test_every_rpc_is_in_the_table() -> None:
    modules = (control_pb2, expert_pb2, generate_pb2, placement_pb2, router_pb2)
    services = [s for m in modules for s in m.DESCRIPTOR.services_by_name.values()]
    expected = {
        f"{service.name}.{method.name}" for service in services for method in service.methods
    }
    assert {row[0] for row in table(text_of("wire.md"), "RPC")} == expected


def test_every_metric_is_in_the_table() -> None:
    metrics = Metrics()
    specs = [counter.spec for counter in metrics.counters()]
    specs += [histogram.spec for histogram in metrics.histograms()]
    expected = {(spec.name, spec.unit, ", ".join(spec.labels)) for spec in specs}
    assert {tuple(row[:3]) for row in table(text_of("operations.md"), "name")} == expected


def test_every_span_is_in_the_table() -> None:
    found = set()
    for root in ("services", "router", "experts"):
        for path in (ROOT / root).rglob("*.py"):
            if path.name != "telemetry.py":
                found |= set(_SPAN.findall(path.read_text("utf-8")))
    found.remove("gateway.{method}")
    named = {
        name.strip(" `")
        for row in table(text_of("operations.md"), "span")
        for name in row[0].split(",")
    }
    assert named == found | {"gateway.Generate", "gateway.Score"}


def test_the_families_are_those_of_the_tests() -> None:
    assert [row[0] for row in table(text_of("exactness.md"), "family")] == list(FAMILIES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text("utf-8")):
        if "://" not in target:
            path = page.parent / target.partition("#")[0]
            assert path.exists(), f"{page.name} links to {target}"


def all_files() -> set[str]:
    """Paths of all files, with a slash before."""
    found = [p for root in SOURCES for p in (ROOT / root).rglob("*")]
    return {f"/{p.relative_to(ROOT)}" for p in [*found, *ROOT.glob("*")] if p.is_file()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_exist(page: Path) -> None:
    """Full paths, or the end of one: `router/plan.py` is router/expertmesh/router/plan.py."""
    files = all_files()
    for piece in _INLINE.findall(_FENCE.sub("", page.read_text("utf-8"))):
        is_path = piece.endswith(SUFFIXES) or piece.startswith(tuple(f"{s}/" for s in SOURCES))
        if is_path and re.fullmatch(r"[\w.-][\w./-]*", piece) and piece not in OUTSIDE:
            exists = any(f"/{piece.rstrip('/')}/" in f"{file}/" for file in files)
            assert exists, f"{page.name} names {piece}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_named_exist(page: Path) -> None:
    targets = set(
        re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    )
    commands = {module.__name__.rpartition(".")[2] for module in cli.COMMANDS}
    for piece in code(page.read_text("utf-8")):
        for target in re.findall(r"(?:^|\s)make ([a-z][a-z0-9-]*)", piece):
            assert target in targets, f"{page.name}: make {target}"
        for command in re.findall(r"(?:^|\s)expertmesh ([a-z]+)\b", piece):
            assert command in commands, f"{page.name}: expertmesh {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_named_exist(page: Path) -> None:
    flags = {
        flag
        for command in cli.COMMANDS
        for flag in re.findall(r"\"(--[a-z-]+)\"", Path(str(command.__file__)).read_text("utf-8"))
    } | set(re.findall(r"\"(--[a-z-]+)\"", (ROOT / COMMON).read_text("utf-8")))
    for piece in code(page.read_text("utf-8")):
        ours = re.search(r"\bexpertmesh (?=[a-z])(.*)", piece)  # not kubectl's -n expertmesh
        for flag in re.findall(r"--[a-z][a-z-]*", ours[1] if ours else ""):
            assert flag in flags, f"{page.name}: {piece}"


def test_the_bars_are_those_of_the_results() -> None:
    page = text_of("performance.md")
    assert page == with_table(page), "run `python -m benchmarks.summary`"


def test_the_drills_are_described_and_their_results_are_those_of_the_last_runs() -> None:
    page = text_of("failures.md")
    described = {name.strip(" `") for row in table(page, "drill") for name in row[0].split(",")}
    assert described == set(DRILLS)
    assert page == with_tables(page), "run `python -m chaos.results`"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_pages_are_plain(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text.isascii()
    assert all(len(line) <= WIDTH for line in text.splitlines())
    for block in blocks(text, "python"):
        compile(block, page.name, "exec")
