"""How the cost of a call grows along six axes, one at a time around a base point.

D hidden size, F FFN size, K top-k.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from benchmarks.harness.callers import Callers, Load
from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.lines import Growth, weigh
from benchmarks.harness.mesh import BenchMesh, bench_mesh
from benchmarks.harness.plots import BLUE, GREY, ORANGE, figure
from benchmarks.harness.report import Bar, Report, Row
from benchmarks.harness.turns import Turn, percentile, take_turns

D, F = 256, 512
BASE = Load()
AXES: Mapping[str, Sequence[int]] = {
    "rows": (1, 4, 16, 64, 256, 1024, 4096),
    "top_k": (1, 2, 3, 4, 6, 8),
    "experts": (8, 16, 32, 64, 128, 256),
    "groups": (1, 2, 4, 8, 12, 16),
    "layers": (4, 8, 12, 16, 24, 32),
    "callers": (1, 2, 4, 8, 16, 32),
}
_TITLES = {
    "rows": "tokens of a call",
    "top_k": "experts per token",
    "experts": "experts of a layer",
    "groups": "expert groups",
    "layers": "layers of a call",
    "callers": "callers at once",
}
BOUND = 1.15
PLOT = "growth.svg"
_ABOUT = (
    f"One thing grows at a time around {BASE.rows} tokens, top-{BASE.top_k} of {BASE.experts} "
    f"experts (D={D}, F={F}, float32) in {BASE.groups} groups, one layer, one caller. All points "
    "of an axis take turns; a p50 is the median of the rounds' p50s. Linear or better beyond a "
    "fixed cost is asked twice, from the cheapest point on. **Over the line**: a line through the "
    "first half of the points is extended, and no later p50 may lie far above it; that says little "
    "where the first units are the dearest. **Under a chord**: no p50 may lie far below a straight "
    "line between two others, of which (0, 0) is one. 'Without a round' is what they would have "
    "been with one round less.\n\n"
    "Where the curves bend: few tokens hit few experts and replicas, so at first every token adds "
    "weights to be read (experts hit) and messages (replicas asked); once all are hit only "
    "arithmetic grows. Tokens, experts per token and experts of a layer bend down there. One group "
    "leaves a core idle, two do not; beyond, each replica asked costs CPU time. One caller leaves "
    "a part of a core idle (cores busy); of more callers, replicas merge the rows, and a call's "
    "CPU time falls. Thousands of page faults per call would be memory that glibc gives back to "
    "the kernel after a large message and takes again for the next: `runtime/heap.py`."
)
_DECADE = 10

Pace = tuple[int, float]
"""Rounds, and seconds of a turn."""


@dataclass(frozen=True)
class Point:
    """What was measured at one x of an axis; times are of one call."""

    x: int
    load: Load
    p50s_ms: Sequence[float]
    """Of each round."""
    p10_ms: float
    p90_ms: float
    cpu_ms: float
    """Of all processes together."""
    tokens_per_s: float
    cores: float
    """Kept busy by all processes together."""
    own_cores: float
    """Kept busy by the calling process."""
    faults: float
    """Page faults of a call."""
    experts_hit: float
    replicas_asked: float

    @property
    def p50_ms(self) -> float:
        """Every round counts the same."""
        return statistics.median(self.p50s_ms)

    @classmethod
    def of(cls, x: int, callers: Callers, turns: Sequence[Turn]) -> "Point":
        """Percentiles of the calls of all turns; rates as medians of the turns."""
        latencies_ms = [1e3 * value for turn in turns for value in turn.latencies_s]
        spent = list(zip(callers.spent, turns, strict=True))
        return cls(
            x,
            callers.load,
            [1e3 * turn.p50_s for turn in turns],
            percentile(latencies_ms, 0.1),
            percentile(latencies_ms, 0.9),
            statistics.median(turn.cpu_ms_per_token * turn.tokens_per_call for turn in turns),
            statistics.median(turn.tokens_per_s for turn in turns),
            statistics.median(turn.cpu_s / turn.wall_s for turn in turns),
            statistics.median(own.own_s / own.wall_s for own in callers.spent),
            statistics.median(own.faults / len(turn.latencies_s) for own, turn in spent),
            callers.experts_hit,
            callers.replicas_asked,
        )


Points = Mapping[str, Sequence[Point]]
"""By axis."""


def _mesh(load: Load, layers: int, root: Path, stack: ExitStack) -> BenchMesh:
    shape = MoeShape(D, F, num_experts=load.experts, num_layers=layers)
    # dozens of replicas stand idle beside the one that is measured: let them be quiet
    mesh = bench_mesh(
        write_experts(shape, root), load.experts, layers, load.groups, heartbeat_s=5, lease_s=60
    )
    return stack.enter_context(mesh)


def _axis(axis: str, xs: Sequence[int], base: BenchMesh, root: Path, pace: Pace) -> list[Point]:
    """Measure the points in turns, each on the base mesh if that has its experts and groups."""
    with ExitStack() as stack:
        contestants = []
        for x in xs:
            load = replace(BASE, **{axis: x})
            as_base = (load.experts, load.groups) == (BASE.experts, BASE.groups)
            mesh = base if as_base else _mesh(load, 1, root, stack)
            contestants.append(Callers(str(x), load, mesh, D))
        turns = take_turns(contestants, *pace)
    pairs = zip(xs, contestants, strict=True)
    return [Point.of(x, callers, turns[callers.name]) for x, callers in pairs]


def _measure(axes: Mapping[str, Sequence[int]], pace: Pace) -> Points:
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = _mesh(BASE, max(axes["layers"]), root, stack)
        return {axis: _axis(axis, xs, base, root, pace) for axis, xs in axes.items()}


def _growth(points: Sequence[Point]) -> Growth:
    return Growth([point.x for point in points], [point.p50_ms for point in points])


def _without_a_round(points: Sequence[Point]) -> Iterator[Growth]:
    """What would have been measured without the first round, without the second, ..."""
    for number in range(len(points[0].p50s_ms)):
        kept = [[*p.p50s_ms[:number], *p.p50s_ms[number + 1 :]] for p in points]
        yield Growth([point.x for point in points], [statistics.median(own) for own in kept])


def _bars(axis: str, points: Sequence[Point]) -> list[Bar]:
    growth, name = _growth(points), axis.replace("_", "-")
    first, last = (points[number].x for number in (growth.fitted[0], growth.fitted[-1]))
    over_line = f"{name}: later p50s over the line through {first} to {last}"
    under_chord = f"{name}: straight line between two p50s over one between them"
    return [
        Bar(over_line, growth.over_line.ratio, BOUND, at_most=True),
        Bar(under_chord, growth.under_chord.ratio, BOUND, at_most=True),
    ]


def _straightness(axis: str, points: Sequence[Point]) -> Row:
    growth, others = _growth(points), list(_without_a_round(points))

    def spread(ratio: Callable[[Growth], float]) -> str:
        ratios = [ratio(other) for other in others]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    return {
        "axis": axis,
        "fixed ms": growth.line.fixed,
        "ms per unit": growth.line.slope,
        "over the line": growth.over_line.ratio,
        "at": growth.over_line.x,
        "without a round": spread(lambda other: other.over_line.ratio),
        "under a chord": growth.under_chord.ratio,
        "at ": growth.under_chord.x,
        "without a round ": spread(lambda other: other.under_chord.ratio),
    }


def _composition(measured: Points) -> list[Row]:
    """What the CPU time of a lone caller's call to one layer is made of."""
    alone = [
        point
        for points in measured.values()
        for point in points
        if point.load.layers == point.load.callers == 1
    ]
    terms = [(p.replicas_asked, p.experts_hit, p.load.rows * p.load.top_k) for p in alone]
    weights = weigh(terms, [point.cpu_ms for point in alone])
    told = [sum(map(float.__mul__, weights, map(float, own))) for own in terms]
    off = [abs(ms / point.cpu_ms - 1) for ms, point in zip(told, alone, strict=True)]
    row: Row = {
        "CPU-ms per replica asked": weights[0],
        "per expert hit": weights[1],
        "per token and expert": weights[2],
        "points": len(alone),
        "off by, median %": 100 * statistics.median(off),
        "most %": 100 * max(off),
    }
    return [row]


def _rows(points: Sequence[Point]) -> list[Row]:
    line = _growth(points).line
    return [
        {
            "x": point.x,
            "p10 ms": point.p10_ms,
            "p50 ms": point.p50_ms,
            "p90 ms": point.p90_ms,
            "line ms": line.at(point.x),
            "CPU-ms per call": point.cpu_ms,
            "tokens/s": point.tokens_per_s,
            "cores busy": point.cores,
            "of them the caller's process": point.own_cores,
            "page faults per call": point.faults,
            "experts hit": point.experts_hit,
            "replicas asked": point.replicas_asked,
        }
        for point in points
    ]


def _draw(measured: Points) -> None:
    with figure(PLOT, width_inch=10, height_inch=6.6) as drawn:
        drawn.suptitle("Cost of a call as one thing grows: milliseconds, both axes logarithmic")
        for axes, (axis, points) in zip(drawn.subplots(2, 3).flat, measured.items(), strict=True):
            _panel(axes, axis, points)
        handles, labels = axes.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _panel(axes: Axes, axis: str, points: Sequence[Point]) -> None:
    growth = _growth(points)
    xs, p50_ms = growth.xs, growth.costs
    after = xs[growth.first :]
    line_ms = [growth.line.at(x) for x in after]
    axes.fill_between(
        xs,
        [point.p10_ms for point in points],
        [point.p90_ms for point in points],
        color=BLUE,
        alpha=0.2,
        linewidth=0,
        label="p10 to p90",
    )
    axes.plot(
        xs, [point.cpu_ms for point in points], "s-", color=ORANGE, ms=4, label="CPU-ms of a call"
    )
    axes.plot(after, line_ms, "--", color=GREY, label="line through the first half (filled dots)")
    axes.plot(xs, p50_ms, "o-", color=BLUE, mfc="white", label="p50 latency")
    fitted = growth.fitted
    axes.plot(xs[fitted[0] : fitted[-1] + 1], p50_ms[fitted[0] : fitted[-1] + 1], "o", color=BLUE)
    over, under = growth.over_line.ratio, growth.under_chord.ratio
    axes.set_title(f"{_TITLES[axis]}\nover the line {over:.2f}, under a chord {under:.2f}")
    axes.set(xscale="log", yscale="log")
    least, most = axes.get_ylim()
    subs = (1, 2, 5) if most > _DECADE * least else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axes.xaxis.set_major_locator(FixedLocator(list(xs)))
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    for ticks in (axes.xaxis, axes.yaxis):
        ticks.set_major_formatter("{x:g}")
        ticks.set_minor_locator(NullLocator())


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    torch.set_num_threads(1)
    axes = {axis: xs[:3] for axis, xs in AXES.items()} if quick else AXES
    measured = _measure(axes, (2, 0.1) if quick else (7, 0.4))
    report = Report("growth", _ABOUT)
    for axis, points in measured.items():
        report.bars += _bars(axis, points)
    report.tables["How straight"] = [_straightness(*own) for own in measured.items()]
    report.tables["What CPU time is made of"] = _composition(measured)
    report.tables |= {axis: _rows(points) for axis, points in measured.items()}
    report.raw["p50 ms of each round"] = {
        axis: {point.x: list(point.p50s_ms) for point in points}
        for axis, points in measured.items()
    }
    if not quick:
        _draw(measured)
        report.plots.append(PLOT)
    return report
