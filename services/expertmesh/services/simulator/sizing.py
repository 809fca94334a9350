"""What a mesh that never changes would need for its busiest seconds, and what nobody can go below.

Both are made of what a static run has measured: how busy the replicas of each group were over time.

W windows, G groups.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from expertmesh.services.simulator.outcome import Outcome
from expertmesh.services.simulator.scenario import Scenario
from expertmesh.services.simulator.studies import Progress, Run, silent, simulate, with_policy

PEAK_S = 10.0
"""The busiest so many seconds are what is provided for."""
_ROUNDS = 20
_ROUNDING = 1e-9
Floats = NDArray[np.float64]


def busy_replicas_WG(outcome: Outcome, window_s: float = PEAK_S) -> Floats:
    """Replicas of each group that were busy, in the mean over windows one after the other."""
    at_s, busy_s = np.array(outcome.series.at_s), np.array(outcome.series.busy_s)
    edges_s = np.arange(0.0, max(at_s[-1], window_s) + window_s / 2, window_s)
    done_s = np.stack([np.interp(edges_s, at_s, own) for own in busy_s.T], axis=1)
    busy: Floats = np.diff(done_s, axis=0) / window_s
    return busy


def sized_for_objective(
    scenario: Scenario,
    folder: Path,
    start: Sequence[int],
    target_busy_frac: float,
    progress: Progress = silent,
) -> Run:
    """The static mesh that load tests with the whole trace lead to: groups that are busier than the
    target in their busiest seconds get more replicas, until users have what they are promised.

    Args:
        start: replicas of each group to begin with, fewer than will do.
    """
    sizes = list(start)
    for _ in range(_ROUNDS):
        run = simulate(with_policy(scenario, "static", *sizes), folder, progress)
        grown = _no_fewer(sizes, for_busiest(run.outcome, target_busy_frac))
        if run.meets_objective or grown == sizes:
            break
        sizes = grown
    return run


def sized_for_peak(
    tested: Run, folder: Path, target_busy_frac: float, progress: Progress = silent
) -> Run:
    """Static peak provisioning: what the busiest seconds of each group asked of a mesh that met the
    objective, with the headroom of the target."""
    sizes = _no_fewer(
        tested.scenario.scaling.replicas, for_busiest(tested.outcome, target_busy_frac)
    )
    return simulate(with_policy(tested.scenario, "static", *sizes), folder, progress)


def for_busiest(outcome: Outcome, target_busy_frac: float) -> list[int]:
    """Replicas with which each group's busiest seconds would leave them busy to the target."""
    return [_ceil(most) for most in busy_replicas_WG(outcome).max(0) / target_busy_frac]


def _no_fewer(sizes: Sequence[int], wanted: Sequence[int]) -> list[int]:
    return [max(own, other) for own, other in zip(sizes, wanted, strict=True)]


def oracle_gpu_s(busy_WG: Floats, target_busy_frac: float, start_s: float) -> float:
    """GPU-seconds of who knows every window before it comes, and starts replicas in time.

    A replica that is not needed for a while goes, unless to start another one takes longer. No rule
    that keeps replicas no busier than the target in any window can do with less of the same work.

    Args:
        busy_WG: of windows of PEAK_S.
        start_s: a replica costs that long before it takes work.
    """
    needed_WG = np.maximum(1, np.ceil(busy_WG / target_busy_frac - _ROUNDING)).astype(int)
    return sum(
        _held_s(needed_WG[:, group] >= level, start_s)
        for group in range(needed_WG.shape[1])
        for level in range(1, int(needed_WG[:, group].max()) + 1)
    )


def _held_s(is_needed_W: NDArray[np.bool_], start_s: float) -> float:
    places = np.flatnonzero(is_needed_W)
    gaps_s = (np.diff(places) - 1) * PEAK_S
    return float(len(places) * PEAK_S + start_s + np.minimum(gaps_s, start_s).sum())


def _ceil(replicas: float) -> int:
    return math.ceil(replicas - _ROUNDING)
