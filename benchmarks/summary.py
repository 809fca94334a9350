"""The tables of bars in docs/performance.md, from results/: `python -m benchmarks.summary`."""

import json
from pathlib import Path

from benchmarks.__main__ import NAMES
from benchmarks.harness.report import RESULTS, Row, table

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
_BEGIN, _END = "<!-- bars: python -m benchmarks.summary -->\n", "<!-- end of bars -->\n"


def bars_tables() -> str:
    """Every bar of every benchmark that has been run in full, as Markdown in ASCII."""
    parts = []
    for name in NAMES:
        path = RESULTS / f"{name}.json"
        bars = json.loads(path.read_text("utf-8"))["bars"] if path.exists() else []
        if bars:
            parts.append(f"**{name}**\n\n{table([_row(bar) for bar in bars])}\n")
    return "\n".join(parts)


def _row(bar: dict[str, str]) -> Row:
    return {
        "bar": bar["bar"].partition(" (")[0],
        "wanted": bar["wanted"].replace("≤", "<=").replace("≥", ">="),
        "measured": bar["measured"],
        "holds": bar["holds"],
    }


def with_table(page: str) -> str:
    """The page with the tables as they are now."""
    before, _, rest = page.partition(_BEGIN)
    after = rest.partition(_END)[2]
    return before + _BEGIN + "\n" + bars_tables() + "\n" + _END + after


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
