"""How the cost of a call grows along six axes, one at a time around a base point.

T tokens, D hidden size, E experts, K top-k.
"""

import itertools
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.lines import fit, over_foretold
from benchmarks.harness.mesh import BenchMesh, bench_mesh
from benchmarks.harness.plots import Panel, panels
from benchmarks.harness.processes import cpu_seconds, with_descendants
from benchmarks.harness.report import Bar, Report, Row
from benchmarks.harness.turns import Contestant, Turn, Turns, percentile, summary, take_turns
from expertmesh.v1 import router_pb2

D, F = 256, 512
AXES: Mapping[str, Sequence[int]] = {
    "rows": (1, 4, 16, 64, 256, 1024, 4096),
    "top_k": (1, 2, 3, 4, 6, 8),
    "layers": (4, 8, 12, 16, 24, 32),
    "callers": (1, 2, 4, 8, 16, 32),
    "experts": (8, 16, 32, 64, 128, 256),
    "groups": (1, 2, 4, 8, 16),
}
_IN_BASE_MESH = ("rows", "top_k", "layers", "callers")
_MOST_OVER_LINE = 1.15
_LEAST_OF_BEST = 0.9
_BATCHES = 8
_WARM_UP_CALLS = 8
_LEAST_CALLS = 5
_ABOUT = (
    f"One axis at a time around 16 tokens, top-2 of 16 experts (D={D}, F={F}, float32) in 4 "
    "groups, one layer, one caller. A line (a fixed cost and a slope, least squares of relative "
    "errors) is fitted to the lower half of an axis; the bar is the median latency at the largest "
    "point over what that line foretells. Callers share one process; their bar is the throughput "
    "of 32 over the best of any number."
)


@dataclass(frozen=True)
class Load:
    """One call; the defaults are the base point."""

    rows: int = 16
    """Tokens of a call."""
    top_k: int = 2
    experts: int = 16
    groups: int = 4
    layers: int = 1
    """Dispatches of a call, one after the other, each to a layer of its own."""
    callers: int = 1
    """Threads that call at the same time."""


class Callers:
    """A contestant: threads of this process, each in a closed loop over one mesh."""

    def __init__(self, name: str, load: Load, mesh: BenchMesh) -> None:
        self.name = name
        self._load = load
        self._mesh = mesh
        self._batches = itertools.cycle([_batch(load, seed) for seed in range(_BATCHES)])

    def turn(self, seconds: float) -> Turn:
        """See `Contestant.turn`."""
        for _ in range(_WARM_UP_CALLS):
            self._call()
        pids = with_descendants(self._mesh.pids())
        latencies_s: list[float] = []
        cpu_s, started_s = cpu_seconds(pids) + time.process_time(), time.perf_counter()
        end_s = started_s + seconds
        threads = [
            threading.Thread(target=self._loop, args=(end_s, latencies_s))
            for _ in range(self._load.callers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall_s = time.perf_counter() - started_s
        cpu_s = cpu_seconds(pids) + time.process_time() - cpu_s
        return Turn(latencies_s, self._load.rows, wall_s, cpu_s)

    def _loop(self, end_s: float, latencies_s: list[float]) -> None:
        calls = 0
        now_s = time.perf_counter()
        while now_s < end_s or calls < _LEAST_CALLS:
            self._call()
            done_s = time.perf_counter()
            latencies_s.append(done_s - now_s)
            now_s = done_s
            calls += 1

    def _call(self) -> None:
        hidden_TD, experts_TK, weights_TK = next(self._batches)
        slot_sum = router_pb2.COMBINE_SLOT_SUM
        for layer in range(self._load.layers):
            self._mesh.caller.dispatch(layer, hidden_TD, experts_TK, weights_TK, slot_sum)


def _batch(load: Load, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(load.rows, D, generator=random)
    scores_TE = torch.rand(load.rows, load.experts, generator=random)
    weights_TK, experts_TK = scores_TE.topk(load.top_k)
    return hidden_TD, experts_TK, weights_TK


@contextmanager
def _mesh(load: Load, root: Path) -> Iterator[BenchMesh]:
    shape = MoeShape(D, F, num_experts=load.experts, num_layers=load.layers)
    with bench_mesh(write_experts(shape, root), load.experts, load.layers, load.groups) as mesh:
        yield mesh


def _axis_turns(axis: str, root: Path, mesh: BenchMesh, rounds: int, seconds: float) -> Turns:
    """The turns of every point of an axis, filed under the point."""
    points = {str(x): replace(Load(), **{axis: x}) for x in AXES[axis]}
    if axis in _IN_BASE_MESH:
        contestants: list[Contestant] = [Callers(x, load, mesh) for x, load in points.items()]
        return take_turns(contestants, rounds, seconds)
    done: Turns = {}
    for x, load in points.items():
        with _mesh(load, root) as own:
            done |= take_turns([Callers(x, load, own)], rounds, seconds)
    return done


def _bar(axis: str, turns: Turns) -> Bar:
    if axis == "callers":
        tokens_per_s = [summary(own)["tokens_per_s"] for own in turns.values()]
        frac = tokens_per_s[-1] / max(tokens_per_s)
        return Bar("callers: throughput of 32 / the best", frac, _LEAST_OF_BEST)
    p50s_ms = [summary(own)["p50_ms"] for own in turns.values()]
    over = over_foretold(AXES[axis], p50s_ms)
    return Bar(f"{axis}: p50 at {AXES[axis][-1]} / the line", over, _MOST_OVER_LINE, at_most=True)


def _panel(axis: str, turns: Turns) -> Panel:
    xs = AXES[axis]
    pooled = [[1e3 * s for turn in own for s in turn.latencies_s] for own in turns.values()]
    p50s, lows, highs = ([percentile(v, frac) for v in pooled] for frac in (0.5, 0.1, 0.9))
    half = (len(xs) + 1) // 2
    line = fit(xs[:half], p50s[:half])
    label = f"{line.fixed:.2g} + {line.slope:.2g} x, from the lower half"
    return Panel(f"by {axis}", axis, "latency (ms)", xs, p50s, lows, highs, line.at, label)


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("growth", _ABOUT)
    torch.set_num_threads(1)
    drawn = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with _mesh(replace(Load(), layers=AXES["layers"][-1]), root) as mesh:
            for axis in _IN_BASE_MESH if quick else AXES:
                turns = _axis_turns(axis, root, mesh, *((1, 0.05) if quick else (3, 0.5)))
                report.bars.append(_bar(axis, turns))
                rows: list[Row] = [{axis: float(x), **summary(own)} for x, own in turns.items()]
                report.tables[f"By {axis}"] = rows
                drawn.append(_panel(axis, turns))
    if not quick:
        report.plots.append(panels("growth", drawn))
    return report
