"""What the drills measured: benchmarks/results/chaos.json, and the tables in docs/failures.md.

`python -m chaos.results` writes the tables again.
"""

import json
import textwrap
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.harness.report import RESULTS, machine, table

from chaos.drills import DRILLS
from chaos.watch import Drilled

FILE = RESULTS / "chaos.json"
PAGE = Path(__file__).parents[1] / "docs" / "failures.md"
_BEGIN, _END = "<!-- drills: python -m chaos.results -->\n", "<!-- end of drills -->\n"
_WIDTH = 108
_ASCII = str.maketrans({"≤": "<=", "≥": ">="})


def keep(name: str, drilled: Drilled) -> None:
    """Put the result of a drill in the place of the last."""
    found = read()
    found[name] = {
        "date": str(date.today()),
        "machine": machine(),
        "rows": [dict(row) for row in drilled.rows],
        "bars": [dict(bar.as_row()) for bar in drilled.bars],
        "notes": drilled.notes,
        "worst": [dict(row) for row in drilled.worst],
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n")


def read() -> dict[str, Any]:
    """Results by drill."""
    return dict(json.loads(FILE.read_text("utf-8"))) if FILE.exists() else {}


def tables() -> str:
    """All that was measured, as Markdown in ASCII: bars, then what callers saw."""
    found = read()
    done = [(name, found[name]) for name in DRILLS if name in found]
    bars = [bar for _, drill in done for bar in drill["bars"]]
    rows = [row for _, drill in done for row in drill["rows"]]
    notes = [_item(f"`{name}`: {note}") for name, drill in done for note in drill["notes"]]
    parts = [table(part) for part in (bars, rows) if part]
    if notes:
        parts.append("\n".join(notes))
    return "\n\n".join(parts).translate(_ASCII)


def _item(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="- ", subsequent_indent="  ")


def with_tables(page: str) -> str:
    """The page with the tables as they are now."""
    before, _, rest = page.partition(_BEGIN)
    after = rest.partition(_END)[2]
    return f"{before}{_BEGIN}\n{tables()}\n\n{_END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")
