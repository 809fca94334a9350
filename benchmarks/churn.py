"""How many copies of experts move when load is noisy, and when it really changes: simulated.

The controller's own code (`router/replan.py`) beside DeepSeek's EPLB, which plans afresh.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from benchmarks.balance import EXPERTS, SPARE, Loads, lognormal, zipf
from benchmarks.harness.eplb import eplb_placement
from benchmarks.harness.report import Bar, Report, Row
from benchmarks.harness.turns import percentile
from expertmesh.router.balance import balance
from expertmesh.router.moves import Holdings
from expertmesh.router.placement import Placement, plan_placement
from expertmesh.router.popularity import Popularity
from expertmesh.router.replan import ReplanLimits, Replanner

REPLICAS = 32
SLOTS = (EXPERTS + SPARE) // REPLICAS
_WINDOW_ROWS = 1e6
_STEP_COPIES = 5
_BAR_NOISE = 0.05
"""Up to which there are bars."""
_ABOUT = (
    "Copies of experts that move at each replan, and max/mean load, 1.00 being perfect. Each "
    "window has the expected loads times (1 + noise), and a replan. **EPLB** plans for the "
    "window's loads afresh, as it is used, and splits an expert's tokens evenly over its copies. "
    "**controller** is `router/replan.py` with its defaults, where dispatch is solved for each "
    f"window's loads (`router/balance.py`) and a replan loads at most {_STEP_COPIES} experts. A "
    "copy has moved if the replica did not hold the expert before. One copy of each expert stays, "
    "as those of a replica's configuration do. Over all seeds and windows."
)


@dataclass
class Run:
    """What one contestant did."""

    moved: list[float] = field(default_factory=list)
    """Share of all copies that moved, by replan."""
    ratios: list[float] = field(default_factory=list)
    """Max/mean load of each window, after its replan."""


def moved(before: Placement, after: Placement) -> float:
    """Share of the copies that were not where they are."""
    new = sum(len(set(b) - set(a)) for a, b in zip(before, after, strict=True))
    return new / sum(map(len, after))


def even_split(loads: Loads, placement: Placement) -> float:
    """Max/mean if each expert's rows are split evenly over its copies."""
    level = [0.0] * REPLICAS
    for load, holders in zip(loads, placement, strict=True):
        for own in holders:
            level[own] += load / len(holders)
    return max(level) / (sum(loads) / REPLICAS)


class Controller:
    """The mesh's replanner over one layer."""

    def __init__(self, expected: Loads, limits: ReplanLimits) -> None:
        self._speeds = [1.0] * REPLICAS
        placement = plan_placement(expected, self._speeds, [SLOTS] * REPLICAS)
        nodes = [str(own) for own in range(REPLICAS)]
        at_home = frozenset((0, expert, own[0]) for expert, own in enumerate(placement))
        self._holdings = Holdings({0: placement}, [0] * REPLICAS, {0: 1}, nodes, at_home)
        self._popularity = Popularity({0: EXPERTS}, limits.half_life_windows)
        self._replanner = Replanner(limits)

    def window(self, loads: Loads, run: Run) -> None:
        """One window's loads, and what is done about them."""
        self._popularity.observe({0: loads})
        before = [list(own) for own in self._holdings.placement[0]]
        found = self._replanner.decide(self._popularity, self._speeds, self._holdings)
        for move in found.moves:
            self._holdings.apply(move.steps)
        after = self._holdings.placement[0]
        run.moved.append(moved(before, after))
        run.ratios.append(balance(loads, self._speeds, after).ratio)


class Eplb:
    """Plans afresh in each window."""

    def __init__(self, expected: Loads) -> None:
        self._placement = eplb_placement(expected, [SLOTS] * REPLICAS)

    def window(self, loads: Loads, run: Run) -> None:
        """As `Controller.window`."""
        after = eplb_placement(loads, [SLOTS] * REPLICAS)
        run.moved.append(moved(self._placement, after))
        run.ratios.append(even_split(loads, after))
        self._placement = after


def noisy(expected: Loads, noise: float, random: Random) -> Loads:
    """A window's rows."""
    scale = _WINDOW_ROWS / sum(expected)
    return [max(0.0, load * scale * random.gauss(1, noise)) for load in expected]


def _limits() -> ReplanLimits:
    return ReplanLimits(max_step_bytes=_STEP_COPIES)


def _runs(
    kind: Callable[[Random], Loads],
    seeds: Sequence[int],
    windows: Callable[[Loads, Random], Iterator[Loads]],
) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {"EPLB": [], "controller": []}
    for seed in seeds:
        random = Random(seed)
        expected = kind(random)
        eplb, controller = Eplb(expected), Controller(expected, _limits())
        runs = Run(), Run()
        for loads in windows(expected, random):
            eplb.window(loads, runs[0])
            controller.window(loads, runs[1])
        found["EPLB"].append(runs[0])
        found["controller"].append(runs[1])
    return found


def _noise_row(name: str, runs: Sequence[Run]) -> Row:
    shares = [share for run in runs for share in run.moved]
    ratios = [ratio for run in runs for ratio in run.ratios]
    return {
        "contestant": name,
        "moved, mean": f"{statistics.fmean(shares):.1%}",
        "moved, most": f"{max(shares):.1%}",
        "max/mean, mean": f"{statistics.fmean(ratios):.3f}",
        "max/mean, p99": f"{percentile(ratios, 0.99):.3f}",
        "max/mean, most": f"{max(ratios):.3f}",
    }


def _change_row(name: str, runs: Sequence[Run], changed_at: int) -> Row:
    after = [run.ratios[changed_at:] for run in runs]
    return {
        "contestant": name,
        "copies moved in all": f"{statistics.fmean(sum(r.moved[changed_at:]) for r in runs):.0%}",
        "moved at once, most": f"{max(share for r in runs for share in r.moved[changed_at:]):.1%}",
        "max/mean right after": f"{statistics.fmean(own[0] for own in after):.3f}",
        "max/mean at the end": f"{statistics.fmean(own[-1] for own in after):.3f}",
    }


def _noise(report: Report, noise: float, seeds: Sequence[int], count: int) -> list[Row]:
    """The table of a noise, and its bars if there are some."""

    def windows(expected: Loads, random: Random) -> Iterator[Loads]:
        return (noisy(expected, noise, random) for _ in range(count))

    rows: list[Row] = []
    for kind in (zipf, lognormal):
        found = _runs(kind, seeds, windows)
        rows += [_noise_row(f"{kind.__name__} 1.0: {name}", runs) for name, runs in found.items()]
        if noise <= _BAR_NOISE:
            ours, what = found["controller"], f"{kind.__name__}, {noise:.0%} noise: "
            most = 100 * max(share for own in ours for share in own.moved)
            worst = max(ratio for own in ours for ratio in own.ratios)
            report.bars += [
                Bar(f"{what}copies moved, most, in %", most, 2, at_most=True, unit=""),
                Bar(f"{what}max/mean, most", worst, 1.03, at_most=True),
            ]
    return rows


def _change(share: float, seeds: Sequence[int], calm: int, changed: int) -> list[Row]:
    """What becomes of a share of the experts changing places."""

    def drift(expected: Loads, random: Random) -> Iterator[Loads]:
        for _ in range(calm):
            yield noisy(expected, _BAR_NOISE, random)
        now = shuffled(expected, share, random)
        for _ in range(changed):
            yield noisy(now, _BAR_NOISE, random)

    found = _runs(zipf, seeds, drift)
    return [_change_row(f"{share:.0%} of experts: {n}", runs, calm) for n, runs in found.items()]


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("churn", _ABOUT)
    seeds, count = (range(1), 4) if quick else (range(10), 40)
    calm, changed = (2, 4) if quick else (10, 30)
    for noise in (0.01, _BAR_NOISE, 0.2):
        title = f"{noise:.0%} noise; {EXPERTS} experts, {REPLICAS} replicas, {SPARE} spare slots"
        report.tables[title] = _noise(report, noise, seeds, count)
    title = f"Popularity changes for good (zipf 1.0, 5% noise); {changed} windows after it"
    report.tables[title] = [
        row for share in (0.1, 1.0) for row in _change(share, seeds, calm, changed)
    ]
    return report


def shuffled(loads: Loads, share: float, random: Random) -> Loads:
    """Some of the experts change places."""
    chosen = random.sample(range(len(loads)), round(share * len(loads)))
    found, others = list(loads), random.sample(chosen, len(chosen))
    for to, own in zip(chosen, others, strict=True):
        found[to] = loads[own]
    return found
