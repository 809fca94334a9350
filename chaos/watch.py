"""Watches a drill: when it was healthy, when something was wrong, and what callers saw of it."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Self

from benchmarks.harness.report import Bar, Row

from chaos.calls import Calls
from chaos.load import Load

Span = tuple[float, float]
"""From and until, by CLOCK_MONOTONIC."""
HEDGED_STALL_S = 0.4
"""What a call may take longer than usual when a replica falls silent."""
_TICK_S = 0.01
NUM_WORST = 12
SLACK = 2.0
"""A call is troubled if it takes so many times the longest of those that were served in health."""


@dataclass
class Drilled:
    """The result of a drill."""

    rows: list[Row] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a reader has to know; why it was skipped."""
    worst: list[Row] = field(default_factory=list)
    """The longest calls from the first fault on."""

    def to_json(self) -> str:
        """For a process that ran a drill, to tell the one that asked for it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        found = json.loads(text)
        return cls(**{**found, "bars": [Bar(**bar) for bar in found["bars"]]})


class Noise:
    """How late a timer of this process is, which has nothing else to do: what others on the machine
    cost. Of whatever takes several turns of several processes, it is a part of each."""

    def __init__(self) -> None:
        self._late: list[tuple[float, float]] = []
        self._task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        while True:
            due_s = time.monotonic() + _TICK_S
            await asyncio.sleep(_TICK_S)
            now_s = time.monotonic()
            self._late.append((now_s, now_s - due_s))

    def stop(self) -> None:
        """Listen no more."""
        self._task.cancel()

    def longest_s(self, from_s: float, until_s: float = float("inf")) -> float:
        """The latest it was in a time."""
        return max((late for at_s, late in self._late if from_s <= at_s < until_s), default=0.0)


class Watch:
    """Of one drill over one caller process."""

    def __init__(self, name: str, load: Load) -> None:
        self.name = name
        self.load = load
        self.healthy_span: Span = (0.0, 0.0)
        self.reduced_span: Span = (0.0, 0.0)
        """In which a replica was absent and everybody knew."""
        self.faults: list[Span] = []
        self.calls = Calls.of(b"")
        self._noise = Noise()

    async def healthy(self, seconds: float) -> None:
        """Nothing is wrong for so long."""
        self.healthy_span = await _span(seconds)

    async def reduced(self, seconds: float) -> None:
        """A replica is absent for so long, as everybody knows."""
        self.reduced_span = await _span(seconds)

    @contextmanager
    def fault(self) -> Iterator[None]:
        """Something is wrong while this lasts."""
        from_s = time.monotonic()
        try:
            yield
        finally:
            self.faults.append((from_s, time.monotonic()))

    async def finish(self) -> Drilled:
        """Stop the callers; the rows of healthy and of faulty times."""
        self._noise.stop()
        self.calls = await self.load.stop()
        rows = [self._row("healthy", self.healthy_calls), self._row("faults", self.fault_calls)]
        return Drilled(rows, worst=self._worst())

    def _worst(self) -> list[Row]:
        """The longest calls, and when they started, counted from the fault before their end."""
        starts = [from_s for from_s, _ in self.faults]
        found: list[Row] = []
        for start_s, took_s in self.fault_calls.longest(NUM_WORST):
            fault_s = max(own for own in starts if own < start_s + took_s)
            found.append(
                {"call s": took_s, "started after the fault, s": f"{start_s - fault_s:.2f}"}
            )
        return found

    @property
    def healthy_calls(self) -> Calls:
        """Those that came and ended in the healthy time."""
        from_s, until_s = self.healthy_span
        return self.calls.started(from_s, until_s).ended(from_s, until_s)

    @property
    def fault_calls(self) -> Calls:
        """Those that were under way at the first fault or came later."""
        return self.calls.running(self.faults[0][0], float("inf"))

    @property
    def usual_s(self) -> float:
        """A call that takes longer is troubled."""
        return SLACK * self.healthy_calls.longest_s

    @property
    def throughput(self) -> float:
        """Calls per second while something was wrong, as a share of those while a replica was
        absent as everybody knew; of the healthy ones if there was no such time."""
        total_s = sum(until_s - from_s for from_s, until_s in self.faults)
        served = sum(
            self.calls.per_s(*span) * (span[1] - span[0]) for span in self.faults if total_s
        )
        base = self.reduced_span if self.reduced_span[1] else self.healthy_span
        usual = self.calls.per_s(*base)
        return served / total_s / usual if usual else 0.0

    @property
    def recovered_s(self) -> float:
        """The longest time from a fault to the end of the last call that suffered from it."""
        starts = [from_s for from_s, _ in self.faults]
        ends = [*starts[1:], float("inf")]
        return max(
            self.calls.recovered_s(from_s, until_s, self.usual_s)
            for from_s, until_s in zip(starts, ends, strict=True)
        )

    def _row(self, phase: str, calls: Calls) -> Row:
        faulty = phase == "faults"
        span = (self.faults[0][0], float("inf")) if faulty else self.healthy_span
        return {
            "drill": self.name,
            "time": phase if not faulty else f"{len(self.faults)} faults",
            "calls": len(calls),
            "errors": calls.errors(),
            "inexact": calls.num_inexact_rows,
            "NaN": calls.num_not_numbers,
            "p50 ms": 1e3 * calls.percentile_s(0.5),
            "p99 ms": 1e3 * calls.percentile_s(0.99),
            "longest": 1e3 * calls.longest_s,
            "noise": 1e3 * self._noise.longest_s(*span),
            "back after s": f"{self.recovered_s:.2f}" if faulty else "",
            "rate": f"{self.throughput:.0%}" if faulty else "",
        }

    def none_failed(self) -> Bar:
        """No call failed from the first fault on."""
        return Bar(f"{self.name}: failed calls", self.fault_calls.num_failed, 0, True, "calls")

    def none_wrong(self) -> Bar:
        """No row was wrong from the first fault on."""
        wrong = self.fault_calls.num_inexact_rows
        return Bar(f"{self.name}: inexact rows", wrong, 0, True, "rows")

    def stalls(self, most_s: float = HEDGED_STALL_S) -> Bar:
        """No call took longer."""
        return Bar(f"{self.name}: longest call", self.fault_calls.longest_s, most_s, True, "s")

    def hedged_stalls(self) -> Bar:
        """No call took longer than the p95 of healthy calls and `HEDGED_STALL_S`."""
        return self.stalls(self.healthy_calls.percentile_s(0.95) + HEDGED_STALL_S)


async def _span(seconds: float) -> Span:
    from_s = time.monotonic()
    await asyncio.sleep(seconds)
    return from_s, time.monotonic()
