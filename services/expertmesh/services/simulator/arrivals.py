"""Requests over time, from a CSV in the format of the Azure LLM inference traces. Pure but for
`read_trace`.

A trace is TIMESTAMP, ContextTokens, GeneratedTokens ("2023-11-16 18:17:03.9799600", 4808, 10), one
request a line, ascending.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from expertmesh.runtime.errors import InvalidInput

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOST_TOKENS = 10**7
_SHOWN = 5
_DAY_S = 86400.0

Row = tuple[float, int, int]


@dataclass(frozen=True)
class Arrivals:
    """Requests in the order of their arrival."""

    times_s: NDArray[np.float64]
    """From the beginning of the simulation."""
    context: NDArray[np.int64]
    """Tokens of each prompt, at least 1."""
    generated: NDArray[np.int64]
    """Tokens of each answer, at least 1."""
    duration_s: float

    def __len__(self) -> int:
        return len(self.times_s)

    @property
    def tokens(self) -> int:
        """Tokens that pass through the model: the last one of an answer is not fed back."""
        return int(self.context.sum() + (self.generated - 1).sum())


def read_trace(path: Path) -> Arrivals:
    """The requests of a CSV file.

    Raises:
        InvalidInput: no such file, other columns, or bad rows; lists their line numbers.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise InvalidInput.of("trace.file", expected="a CSV file", got=f"{path}: {error}") from None
    return parse_trace(text.splitlines(), str(path))


def parse_trace(lines: Iterable[str], name: str) -> Arrivals:
    """The requests of a trace; see `read_trace`."""
    reader = csv.reader(lines)
    head = next(reader, [])
    if tuple(cell.strip() for cell in head) != COLUMNS:
        raise InvalidInput.of("trace.file", expected=f"columns {','.join(COLUMNS)}", got=head)
    rows: list[Row] = []
    wrong: list[str] = []
    for cells in reader:
        if not cells:
            continue
        try:
            rows.append(_row(cells, rows[-1][0] if rows else 0.0))
        except ValueError as error:
            wrong.append(f"line {reader.line_num}: {error}")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise InvalidInput(
            f"{name}: {'; '.join(wrong[:_SHOWN])}{more}. Mend or remove these rows.",
            field="trace.file",
            rows=len(wrong),
        )
    if not rows:
        raise InvalidInput.of("trace.file", expected="at least one request", got=f"none in {name}")
    times, context, generated = (np.array(column) for column in zip(*rows, strict=True))
    return Arrivals(times - times[0], context, generated, float(times[-1] - times[0]))


def _row(cells: list[str], before_s: float) -> Row:
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(cells)} cells instead of {len(COLUMNS)}")
    context, generated = (
        _tokens(cell, name) for cell, name in zip(cells[1:], COLUMNS[1:], strict=True)
    )
    try:
        # seven digits of a second are one more than Python reads
        time_s = datetime.fromisoformat(cells[0].strip()[:26] + "+00:00").timestamp()
    except ValueError:
        raise ValueError(f"TIMESTAMP {cells[0]!r} is not like 2023-11-16 18:17:03.97") from None
    if time_s < before_s:
        raise ValueError(f"TIMESTAMP {cells[0]!r} is before that of the row above")
    return time_s, context, generated


def _tokens(cell: str, name: str) -> int:
    if not cell.strip().isdecimal() or not 1 <= int(cell) <= _MOST_TOKENS:
        raise ValueError(f"{name} {cell!r} is not a number from 1 to {_MOST_TOKENS}")
    return int(cell)


def repeated(
    own: Arrivals,
    rate: float,
    spread_s: float,
    duration_s: float | None,
    daily_swing: float,
    random: np.random.Generator,
) -> Arrivals:
    """The trace `rate` times as dense, as long as asked for.

    Every row stands for `rate` requests (at random for the broken part of it), which come within
    `spread_s` after it. So bursts stay as strong and as long as they are.
    """
    length_s = own.duration_s or 1.0
    wanted_s = duration_s or length_s
    rounds = int(np.ceil(wanted_s / length_s))
    times = (np.arange(rounds)[:, None] * length_s + own.times_s[None, :]).reshape(-1)
    picks = np.tile(np.arange(len(own)), rounds)
    whole = int(rate)
    counts = whole + (random.random(len(picks)) < rate - whole)
    picks, times = np.repeat(picks, counts), np.repeat(times, counts)
    if rate != 1:
        times = times + random.random(len(times)) * spread_s
    if daily_swing:
        awake = 1 - daily_swing * (1 + np.cos(2 * np.pi * times / _DAY_S)) / 2
        keep = random.random(len(times)) < awake
        picks, times = picks[keep], times[keep]
    order = np.argsort(times, kind="stable")
    order = order[: np.searchsorted(times[order], wanted_s, side="right")]
    picks = picks[order]
    return Arrivals(times[order], own.context[picks], own.generated[picks], wanted_s)
