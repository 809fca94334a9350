"""How evenly dispatch loads replicas, for placements that do not move: simulated, no network.

Every batch is drawn from the load a placement was planned for, or from another one (drift); the
router's own `share_out` says who gets which rows.
"""

import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.harness.eplb import eplb_placement
from benchmarks.harness.report import RESULTS, Bar, Report, Row
from benchmarks.harness.turns import percentile
from expertmesh.router.placement import Placement, lower_bound, plan_placement
from expertmesh.router.pools import Costs, Standing
from expertmesh.router.waterfill import share_out

EXPERTS, SPARE = 256, 32
_ROW_US = 1e4
"""So long that messages and products of their own weigh nothing: balance of rows alone."""
_ABOUT = (
    "Max/mean load of the replicas, 1.00 being perfect, where a replica half as fast has twice the "
    "load for the same rows. **EPLB** is DeepSeek's placement, and **uniform** the way it is used: "
    "a token goes to a copy at random. **chain** is `router/placement.py`; **waterfill** the "
    "router's `share_out`. Placements are planned from expected loads and do not move; batches are "
    "drawn from them. The bound holds for any placement and any dispatch of the expected loads. "
    "Medians over the draws, in brackets the mean and the 90th percentile."
)
Loads = list[float]


@dataclass(frozen=True)
class World:
    """Replicas and what is asked of them."""

    loads: Loads
    speeds: list[float]
    slots: list[int]


def zipf(random: Random) -> Loads:
    """Expected loads by 1/rank, in any order."""
    loads = [1 / rank for rank in range(1, EXPERTS + 1)]
    random.shuffle(loads)
    return loads


def lognormal(random: Random) -> Loads:
    """Expected loads whose logarithm has a deviation of 1."""
    return [random.lognormvariate(0, 1) for _ in range(EXPERTS)]


def draw(loads: Loads, count: int, random: Random) -> dict[int, int]:
    """A batch: rows of each expert that gets some."""
    return dict(sorted(Counter(random.choices(range(len(loads)), loads, k=count)).items()))


def uniform(rows: dict[int, int], placement: Placement, random: Random) -> list[float]:
    """Rows of each replica if every row goes to a copy at random."""
    found = Counter(
        random.choice(placement[expert]) for expert, count in rows.items() for _ in range(count)
    )
    return [found[own] for own in range(1 + max(map(max, placement)))]


def waterfill(
    rows: dict[int, int], placement: Placement, speeds: Sequence[float], random: Random
) -> list[float]:
    """Rows of each replica as the router shares them out."""
    shares = share_out(
        rows,
        {expert: tuple(map(str, placement[expert])) for expert in rows},
        lambda name: Standing(Costs(row_us=_ROW_US / speeds[int(name)])),
        random,
    )
    level = [0.0] * len(speeds)
    for own in shares.values():
        for name, count in own:
            level[int(name)] += count
    return level


def imbalance(rows_G: Sequence[float], speeds: Sequence[float]) -> float:
    """Time of the slowest replica over the time all would take if work were spread evenly."""
    longest = max(rows / speed for rows, speed in zip(rows_G, speeds, strict=False))
    return longest / (sum(rows_G) / sum(speeds))


def _summary(values: Sequence[float]) -> str:
    mean, high = statistics.fmean(values), percentile(values, 0.9)
    return f"{statistics.median(values):.3f} ({mean:.3f}, {high:.3f})"


def _drawn(
    worlds: Callable[[Random], World], count: int, draws: int
) -> tuple[dict[str, list[float]], float]:
    random = Random(7)
    found: dict[str, list[float]] = {}
    bounds = []
    for _ in range(draws):
        world = worlds(random)
        speeds = world.speeds
        rows = draw(world.loads, count, random)
        eplb = eplb_placement(world.loads, world.slots)
        chain = plan_placement(world.loads, speeds, world.slots)
        mean = sum(world.loads) / sum(speeds)
        bounds.append(lower_bound(world.loads, speeds, sum(world.slots)) / mean)
        for name, rows_G in {
            "EPLB, uniform": uniform(rows, eplb, random),
            "EPLB, waterfill": waterfill(rows, eplb, speeds, random),
            "chain, uniform": uniform(rows, chain, random),
            "chain, waterfill": waterfill(rows, chain, speeds, random),
        }.items():
            found.setdefault(name, []).append(imbalance(rows_G, speeds))
    return found, statistics.fmean(bounds)


def _equal(loads: Callable[[Random], Loads]) -> Callable[[Random], World]:
    return lambda random: World(loads(random), [1.0] * 32, [(EXPERTS + SPARE) // 32] * 32)


def _mixed(loads: Callable[[Random], Loads], replicas: int) -> Callable[[Random], World]:
    """Half of them half as fast, with half the slots."""
    half = replicas // 2
    slots = math.ceil((EXPERTS + replicas) / (3 * half))
    speeds, rooms = [2.0] * half + [1.0] * half, [2 * slots] * half + [slots] * half
    return lambda random: World(loads(random), speeds, rooms)


def _row(name: str, found: dict[str, list[float]], bound: float) -> Row:
    return {
        "load": name,
        **{who: _summary(own) for who, own in found.items()},
        "bound": f"{bound:.3f}",
    }


def _drift() -> tuple[dict[str, list[float]], int]:
    """Real counts of Mixtral-8x7B: planned on one subject, served another; 8 replicas, 8 spares."""
    folder = os.environ.get("EXPERTMESH_DATA", RESULTS.parents[2] / "shared" / "data")
    text = (Path(folder) / "mixtral_expert_popularity.json").read_text("utf-8")
    subjects = [own["expert_popularity"] for own in json.loads(text)["subjects"].values()]
    random, speeds, slots = Random(7), [1.0] * 8, [2] * 8
    found: dict[str, list[float]] = {}
    pairs = [(a, b) for a in subjects for b in subjects if a is not b]
    for planned, served in pairs:
        for before, now in zip(planned, served, strict=True):
            rows = {expert: count for expert, count in enumerate(now) if count}
            stale, fresh = eplb_placement(before, slots), eplb_placement(now, slots)
            chain = plan_placement(before, speeds, slots)
            for name, rows_G in {
                "stale EPLB, uniform": uniform(rows, stale, random),
                "fresh EPLB, uniform": uniform(rows, fresh, random),
                "stale EPLB, waterfill": waterfill(rows, stale, speeds, random),
                "stale chain, waterfill": waterfill(rows, chain, speeds, random),
            }.items():
                found.setdefault(name, []).append(imbalance(rows_G, speeds))
    return found, len(pairs)


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("balance", _ABOUT)
    draws = 2 if quick else 40
    rows: list[Row] = []
    for count, most in ((512, 1.20), (4096, 1.08)):
        for load in (zipf, lognormal):
            found, bound = _drawn(_equal(load), count, draws)
            rows.append(_row(f"{load.__name__} 1.0, {count} token-slots", found, bound))
            measured = statistics.median(found["chain, waterfill"])
            what = f"32 equal replicas, {load.__name__}, {count} token-slots"
            report.bars.append(Bar(what, measured, most, at_most=True))
    report.tables["32 equal replicas, 256 experts, 32 spare slots"] = rows
    rows = []
    for replicas in (8, 16, 32):
        found, bound = _drawn(_mixed(zipf, replicas), 100_000, max(2, draws // 8))
        rows.append(_row(f"zipf 1.0, {replicas} replicas", found, bound))
        measured = statistics.median(found["chain, waterfill"])
        what = f"{replicas} replicas, half of them half as fast"
        report.bars.append(Bar(what, measured, 1.05, at_most=True))
    report.tables["Half of the replicas half as fast, with half the slots, a spare slot each"] = (
        rows
    )
    if quick:  # the counts are not part of this checkout
        return report
    drift, pairs = _drift()
    ours = drift["stale chain, waterfill"]
    report.bars.append(Bar("drift: mean over layers", statistics.fmean(ours), 1.04, at_most=True))
    report.bars.append(Bar("drift: 99th percentile", percentile(ours, 0.99), 1.15, at_most=True))
    report.tables[f"Mixtral 8x7B: planned on one subject, served another ({pairs} pairs)"] = [
        {
            "placement, dispatch": name,
            "mean": statistics.fmean(own),
            "p99 layer": percentile(own, 0.99),
            "experts moved": "all that changed" if "fresh" in name else "none",
        }
        for name, own in drift.items()
    ]
    return report
