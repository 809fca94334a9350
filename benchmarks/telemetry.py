"""What it costs to send traces and metrics to a collector.

T tokens, D hidden size, K top-k.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch

from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.collector import collector_process
from benchmarks.harness.mesh import BenchMesh, bench_mesh
from benchmarks.harness.processes import cpu_seconds
from benchmarks.harness.report import Bar, Report, Row
from benchmarks.harness.turns import ClosedLoop, Turns, percentile, summary, take_turns
from expertmesh.v1 import router_pb2

CALLERS = (1, 8)
GROUPS = 4
BOUND = 0.97
_EACH = 4
"""Dispatches of a caller, one after the other, between two times that callers wait for all."""
_ABOUT = (
    f"Layer calls (8 experts, top-2, {GROUPS} groups) with telemetry off, and with the default "
    "settings and a collector on the same two cores: metrics of every call, spans of the traces "
    f"that are sampled. A caller makes {_EACH} layer calls in a row; latencies and tokens are of "
    "all callers' together. Bar: throughput on / off, less what the processes that export do when "
    "nobody calls, because in the turns of both contestants they do it alike."
)


Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A layer and the tokens of a call to it."""

    name: str
    shape: MoeShape
    tokens: int


CASES = (
    Case("demo layer", MoeShape(hidden_size=128, ffn_size=256, dtype="bfloat16"), 1),
    Case("h=512 layer", MoeShape(hidden_size=512, ffn_size=1365), 16),
)


def _calls(mesh: BenchMesh, case: Case, callers: int, pool: ThreadPoolExecutor) -> Call:
    hidden_TD = torch.randn(
        case.tokens, case.shape.hidden_size, dtype=getattr(torch, case.shape.dtype)
    )
    random = torch.Generator().manual_seed(2)  # both ask the same replicas: two for one token
    scores_TE = torch.rand(case.tokens, case.shape.num_experts, generator=random)
    weights_TK, experts_TK = scores_TE.topk(2)

    def one(_: int) -> None:
        slot_sum = router_pb2.COMBINE_SLOT_SUM
        for _ in range(_EACH):
            mesh.caller.dispatch(0, hidden_TD, experts_TK, weights_TK, slot_sum)

    return lambda: list(pool.map(one, range(callers)))


class _Pair:
    """Two meshes of one layer, one of them with a collector."""

    def __init__(self, case: Case, root: Path, stack: ExitStack) -> None:
        self._case = case
        self._collector, endpoint = stack.enter_context(collector_process())
        path, experts = write_experts(case.shape, root), case.shape.num_experts
        self._off = stack.enter_context(bench_mesh(path, experts, 1, GROUPS))
        self._on = stack.enter_context(bench_mesh(path, experts, 1, GROUPS, otlp_endpoint=endpoint))
        self._pool = stack.enter_context(ThreadPoolExecutor(max(CALLERS)))

    def turns(self, callers: int, rounds: int, seconds: float) -> Turns:
        """Of "off" and "on"."""
        contestants = []
        for name, mesh, pids in (("off", self._off, []), ("on", self._on, [self._collector])):
            call = _calls(mesh, self._case, callers, self._pool)
            tokens = callers * _EACH * self._case.tokens
            every = [*pids, *mesh.pids()]
            contestants.append(ClosedLoop(name, call, tokens, partial(list, every), warm_up=5))
        return take_turns(contestants, rounds, seconds)

    def idle_frac(self, seconds: float) -> float:
        """Share of this machine that export takes while nobody calls."""
        pids = {"off": self._off.pids(), "on": [*self._on.pids(), self._collector]}
        before_s = {name: cpu_seconds(own) for name, own in pids.items()}
        time.sleep(seconds)
        spent_s = {name: cpu_seconds(own) - before_s[name] for name, own in pids.items()}
        return (spent_s["on"] - spent_s["off"]) / seconds / (psutil.cpu_count() or 1)


def _bar(name: str, turns: Turns, idle_frac: float) -> tuple[Bar, Row]:
    pairs = zip(turns["on"], turns["off"], strict=True)
    fracs = [on.tokens_per_s / off.tokens_per_s for on, off in pairs]
    median = statistics.median(fracs)
    row: Row = {
        "layer call": name,
        "on / off, p25": percentile(fracs, 0.25),
        "p50": median,
        "p75": percentile(fracs, 0.75),
        "export while idle": idle_frac,
    }
    return Bar(f"{name}: throughput on / off", median - idle_frac, BOUND), row


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("telemetry", _ABOUT)
    torch.set_num_threads(1)
    rows: list[Row] = []
    ratios: list[Row] = []
    for case in CASES[:1] if quick else CASES:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            pair = _Pair(case, Path(folder), stack)
            idle_frac = pair.idle_frac(0.1 if quick else 10.0)
            for callers in CALLERS:
                name = f"{case.name}, T={case.tokens}, {callers} callers"
                turns = pair.turns(callers, *((2, 0.2) if quick else (30, 0.5)))
                bar, row = _bar(name, turns, idle_frac)
                report.bars.append(bar)
                ratios.append(row)
                rows += [
                    {"layer call": name, "telemetry": who, **summary(own)}
                    for who, own in turns.items()
                ]
    report.tables["Throughput on / off, over the pairs of turns"] = ratios
    report.tables["Layer calls"] = rows
    return report
