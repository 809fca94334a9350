"""What a benchmark leaves behind: results/NAME.json with everything, NAME.md to read, plots."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parents[1] / "results"

Row = Mapping[str, str | float]


@dataclass(frozen=True)
class Bar:
    """A measured number beside what it has to be."""

    what: str
    measured: float
    bound: float
    at_most: bool = False
    """Whether `bound` is a ceiling instead of a floor."""
    unit: str = "x"

    @property
    def holds(self) -> bool:
        """Whether the bar is reached."""
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    def as_row(self) -> Row:
        """For a table."""
        sign = "≤" if self.at_most else "≥"
        return {
            "bar": self.what,
            "wanted": f"{sign} {self.bound:g} {self.unit}",
            "measured": f"{self.measured:.3g} {self.unit}",
            "holds": "yes" if self.holds else "NO",
        }


@dataclass
class Report:
    """The result of one benchmark.

    Args:
        name: of the benchmark; its command is `python -m benchmarks NAME`.
        about: a paragraph: who competes, on what.
    """

    name: str
    about: str
    tables: dict[str, list[Row]] = field(default_factory=dict)
    """Rows by caption; the rows of a table have the same keys."""
    bars: list[Bar] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)
    """File names in results/, already written."""
    raw: dict[str, Any] = field(default_factory=dict)
    """Whatever else the JSON should keep."""

    def markdown(self) -> str:
        """The report to read."""
        parts = [
            f"# {self.name}",
            self.about,
            f"`python -m benchmarks {self.name}` on {machine()}",
        ]
        parts += [f"![{plot}]({plot})" for plot in self.plots]
        if self.bars:
            parts.append(table([bar.as_row() for bar in self.bars]))
        for caption, rows in self.tables.items():
            parts += [f"## {caption}", table(rows)]
        return "\n\n".join(parts) + "\n"

    def write(self) -> None:
        """results/NAME.json and NAME.md."""
        RESULTS.mkdir(exist_ok=True)
        everything = {
            "name": self.name,
            "machine": machine(),
            "bars": [dict(bar.as_row()) for bar in self.bars],
            "tables": {
                caption: [dict(row) for row in rows] for caption, rows in self.tables.items()
            },
            "raw": self.raw,
        }
        (RESULTS / f"{self.name}.json").write_text(json.dumps(everything, indent=1) + "\n")
        (RESULTS / f"{self.name}.md").write_text(self.markdown())


def table(rows: Sequence[Row]) -> str:
    """A Markdown table; floats with three significant digits, "" where a row lacks the key."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    cells = ([_cell(row.get(key, "")) for key in head] for row in rows)
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def machine() -> str:
    """What it was measured on, and when."""
    gib = psutil.virtual_memory().total / 2**30
    return (
        f"{psutil.cpu_count()} cores, {gib:.0f} GiB, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {date.today()}"
    )
