"""Three times more calls than a mesh can answer: what still comes in time, and what it costs."""

import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.mesh import MODEL, event_loop, redis_server, start_replica
from benchmarks.harness.open_loop import Offered, Outcome, requests_of
from benchmarks.harness.processes import pss_bytes
from benchmarks.harness.report import Bar, Report, Row
from benchmarks.harness.router import router_process
from benchmarks.harness.turns import percentile

SHAPE = MoeShape(hidden_size=256, ffn_size=512)
COPIES = 2
TOKENS = 8
ROW_DELAY_S = 0.002
DEADLINE_S = 0.5
CALLERS = (8, 16)
CONNECTIONS = 4
OVERLOAD = 3.0
_ABOUT = (
    f"A layer of {SHAPE.num_experts} experts, top-{SHAPE.top_k}, D={SHAPE.hidden_size}, "
    f"F={SHAPE.ffn_size}; {COPIES} replicas hold all of them; a router; each a process. Every row "
    f"keeps its replica's device busy for {ROW_DELAY_S * 1e3:g} ms more, without the CPU, so that "
    f"devices are the bottleneck. Calls of {TOKENS} tokens with {DEADLINE_S * 1e3:g} ms to go, "
    f"over {CONNECTIONS} connections. The **healthy maximum** is the best that {CALLERS[0]} or "
    f"{CALLERS[1]} callers get who wait for their answers; then {OVERLOAD:g} times as many calls "
    "are offered whether or not they are answered. **Good** is an answer before the deadline."
)


@contextmanager
def _mesh(path: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """The router's address, and the process ids by name."""
    with event_loop() as loop, redis_server(loop) as redis_url:
        fields = {
            "group": "g0",
            "model_dir": str(path),
            "model": MODEL,
            "experts": f"0-{SHAPE.num_experts - 1}",
            "redis_url": redis_url,
            "host": "127.0.0.1",
            "lease_s": 30,
            "log_level": "WARNING",
            "row_delay_s": ROW_DELAY_S,
        }
        names = [f"g0#{copy}" for copy in range(1, COPIES + 1)]
        replicas: list[Any] = [start_replica(fields | {"replica": name}) for name in names]
        try:
            for process in replicas:
                assert process.stdout.readline() == "ready\n", "a replica did not start"
            with router_process(path, redis_url) as (router, address):
                pids = dict(zip(names, (process.pid for process in replicas), strict=True))
                yield address, {"router": router, **pids}
        finally:
            for process in replicas:
                process.terminate()
            for process in replicas:
                process.wait()


class _Memory:
    """Samples of the processes' memory, one a second, in a thread of its own."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._ended = threading.Event()
        self.samples: dict[str, list[int]] = {name: [] for name in pids}

    def __enter__(self) -> "_Memory":
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(1.0):
            for name, pid in self._pids.items():
                self.samples[name].append(pss_bytes(pid))

    def growth(self, name: str) -> float:
        """The end over the time after the first quarter, medians of a few samples."""
        own = self.samples[name]
        start = len(own) // 4
        few = max(1, len(own) // 10)
        return statistics.median(own[-few:]) / statistics.median(own[start : start + few])


async def _healthy(offered: Offered, seconds: float) -> tuple[float, list[Outcome]]:
    """The best calls a second of some numbers of callers, and the calls of half that load."""
    await offered.closed(CALLERS[0], seconds / 2)  # replicas learn what rows cost now
    best = 0.0
    for callers in CALLERS:
        outcomes = await offered.closed(callers, seconds)
        best = max(best, _good_per_s(outcomes))
    return best, await offered.open(best / 2, seconds)


def _good_per_s(outcomes: Sequence[Outcome]) -> float:
    began_s = min(own.began_s for own in outcomes)
    ended_s = max(own.began_s + own.took_s for own in outcomes)
    return sum(own.is_good for own in outcomes) / (ended_s - began_s)


def _normal_after_s(after: Sequence[Outcome], usual_s: float, began_s: float) -> float:
    """When the first ten calls in a row began that were answered as fast as usual."""
    in_a_row = 0
    for index, own in enumerate(after):
        in_a_row = in_a_row + 1 if own.is_good and own.took_s <= usual_s else 0
        if in_a_row == 10:
            return after[index - 9].began_s - began_s
    return float("inf")


def _overrun(outcomes: Sequence[Outcome]) -> float:
    """How much longer than its deadline the latest of the calls took that were not refused."""
    return max(own.took_s for own in outcomes if not own.is_refused) / DEADLINE_S - 1


def _row(name: str, outcomes: Sequence[Outcome]) -> Row:
    codes = Counter(own.code for own in outcomes)
    good = [own.took_s for own in outcomes if own.is_good] or [0.0]
    refused = [own.took_s for own in outcomes if own.is_refused] or [0.0]
    return {
        "load": name,
        "calls": len(outcomes),
        "good / s": _good_per_s(outcomes),
        **{
            code: codes.pop(code, 0)
            for code in ("OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE")
        },
        "others": sum(codes.values()),
        "good p50 ms": 1e3 * percentile(good, 0.5),
        "good p99 ms": 1e3 * percentile(good, 0.99),
        "refused p50 ms": 1e3 * percentile(refused, 0.5),
        "refused p99 ms": 1e3 * percentile(refused, 0.99),
    }


async def _measure(address: str, pids: dict[str, int], seconds: float, report: Report) -> None:
    requests = requests_of(TOKENS, SHAPE.hidden_size, SHAPE.num_experts, SHAPE.top_k)
    async with Offered(address, CONNECTIONS, requests, DEADLINE_S) as offered:
        best, half = await _healthy(offered, max(1.0, seconds / 6))
        with _Memory(pids) as memory:
            over = await offered.open(OVERLOAD * best, seconds)
        began_s = time.perf_counter()
        after = await offered.open(best / 2, max(2.0, seconds / 6))
        again = await offered.closed(CALLERS[1], max(1.0, seconds / 6))
    usual_s = 1.5 * percentile([own.took_s for own in half], 0.99)
    goodput = _good_per_s(over)
    report.raw = {
        "memory_bytes": memory.samples,
        "healthy_per_s": best,
        "late": sum(own.code == "DEADLINE_EXCEEDED" for own in over),
    }
    report.tables["Calls"] = [
        _row("half of the maximum", half),
        _row(f"{OVERLOAD:g} times the maximum", over),
        _row("half of it, right after", after),
        _row(f"{CALLERS[1]} waiting callers, after", again),
    ]
    report.tables["Memory"] = [
        {
            "process": name,
            "at the start, MB": own[0] / 1e6,
            "median, MB": statistics.median(own) / 1e6,
            "at the end, MB": own[-1] / 1e6,
            "most, MB": max(own) / 1e6,
        }
        for name, own in memory.samples.items()
    ]
    grown = max(memory.growth(name) for name in pids)
    report.bars = [
        Bar("goodput over the healthy maximum", goodput / best, 0.9),
        Bar("latest call past its deadline", _overrun(over), 0.05, at_most=True, unit="of it"),
        Bar("memory at the end over that after a quarter", grown, 1.05, at_most=True),
        Bar(
            "until calls are as fast as usual",
            _normal_after_s(after, usual_s, began_s),
            2.0,
            True,
            "s",
        ),
    ]


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("overload", _ABOUT)
    with tempfile.TemporaryDirectory() as folder:
        path = write_experts(SHAPE, Path(folder))
        with _mesh(path) as (address, pids):
            uvloop.run(_measure(address, pids, 3.0 if quick else 60.0, report))
    return report
