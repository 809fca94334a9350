"""Contestants taking turns in one run, so that whatever else the machine does hits them alike."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.harness.processes import cpu_seconds, with_descendants


@dataclass(frozen=True)
class Turn:
    """What one contestant did in one turn."""

    latencies_s: Sequence[float]
    """Of each call."""
    tokens_per_call: float
    wall_s: float
    cpu_s: float
    """Of every process that works for the contestant, client and servers."""

    @property
    def tokens_per_s(self) -> float:
        """Throughput of the turn."""
        return len(self.latencies_s) * self.tokens_per_call / self.wall_s

    @property
    def cpu_ms_per_token(self) -> float:
        """What a token cost."""
        return 1e3 * self.cpu_s / (len(self.latencies_s) * self.tokens_per_call)

    @property
    def p50_s(self) -> float:
        """Median latency."""
        return statistics.median(self.latencies_s)


class Contestant(Protocol):
    """Something that can be measured for a while."""

    @property
    def name(self) -> str:
        """Under which its turns are filed."""
        ...

    def turn(self, seconds: float) -> Turn:
        """Work in a closed loop for about `seconds`."""
        ...


@dataclass(frozen=True)
class ClosedLoop:
    """A contestant called from this thread: the next call starts when the last one returned.

    Args:
        call: one call.
        tokens: of one call.
        pids: processes whose CPU time counts, with their descendants; this one always does.
        least: calls of a turn, however long they take.
        warm_up: calls before each turn that do not count.
    """

    name: str
    call: Callable[[], object]
    tokens: float
    pids: Callable[[], Iterable[int]] = tuple
    least: int = 5
    warm_up: int = 2

    def turn(self, seconds: float) -> Turn:
        """See `Contestant.turn`."""
        for _ in range(self.warm_up):
            self.call()
        pids = with_descendants(self.pids())
        latencies_s: list[float] = []
        own_s, cpu_s, started_s = time.process_time(), cpu_seconds(pids), time.perf_counter()
        end_s = started_s + seconds
        now_s = started_s
        while now_s < end_s or len(latencies_s) < self.least:
            self.call()
            done_s = time.perf_counter()
            latencies_s.append(done_s - now_s)
            now_s = done_s
        cpu_s = cpu_seconds(pids) - cpu_s + time.process_time() - own_s
        return Turn(latencies_s, self.tokens, now_s - started_s, cpu_s)


Turns = dict[str, list[Turn]]


def take_turns(contestants: Sequence[Contestant], rounds: int, seconds: float) -> Turns:
    """`rounds` turns of each; every other round goes backwards, so that nobody is always first."""
    done: Turns = {contestant.name: [] for contestant in contestants}
    for number in range(rounds):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            done[contestant.name].append(contestant.turn(seconds))
    return done


def percentile(values: Iterable[float], frac: float) -> float:
    """The value below which `frac` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(frac * (len(ordered) - 1)))]


def summary(turns: Sequence[Turn]) -> dict[str, float]:
    """Latencies pooled over all turns; throughput and CPU as medians of the turns."""
    latencies_s = [value for turn in turns for value in turn.latencies_s]
    return {
        "calls": len(latencies_s),
        "p10_ms": 1e3 * percentile(latencies_s, 0.10),
        "p50_ms": 1e3 * statistics.median(latencies_s),
        "p99_ms": 1e3 * percentile(latencies_s, 0.99),
        "tokens_per_s": statistics.median(turn.tokens_per_s for turn in turns),
        "cpu_ms_per_token": statistics.median(turn.cpu_ms_per_token for turn in turns),
    }


def ratio(
    done: Mapping[str, Sequence[Turn]],
    over: str,
    under: str,
    of: Callable[[Turn], float] = lambda turn: turn.p50_s,
) -> float:
    """Median over the rounds of `of(over) / of(under)`: neighbours in time are compared."""
    pairs = zip(done[over], done[under], strict=True)
    return statistics.median(of(above) / of(below) for above, below in pairs)
