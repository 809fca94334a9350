"""Static meshes to compare with, and the bound that knows the future."""

from pathlib import Path

import numpy as np
import pytest
from tests.unit.services.simulator_worlds import scenario, write_trace

from expertmesh.services.simulator.sizing import (
    PEAK_S,
    busy_replicas_WG,
    for_busiest,
    oracle_gpu_s,
    sized_for_objective,
    sized_for_peak,
)
from expertmesh.services.simulator.studies import simulate, with_policy


def test_the_oracle_starts_what_each_window_needs_and_pays_for_starts() -> None:
    busy_WG = np.array([[0.5], [2.1], [0.5], [0.5]])
    # one replica all the time, two more in the second window: ceil(2.1 / 0.7) = 3
    wanted_s = (4 * PEAK_S + 6.0) + 2 * (PEAK_S + 6.0)
    assert oracle_gpu_s(busy_WG, 0.7, 6.0) == pytest.approx(wanted_s)


def test_the_oracle_keeps_a_replica_if_starting_it_anew_takes_longer() -> None:
    busy_WG = np.array([[1.4], [0.1], [1.4]])
    assert oracle_gpu_s(busy_WG, 0.7, 4.0) == pytest.approx((30.0 + 4.0) + (20.0 + 4.0 + 4.0))
    assert oracle_gpu_s(busy_WG, 0.7, 25.0) == pytest.approx(2 * (30.0 + 25.0))


def test_no_group_is_below_one_replica() -> None:
    assert oracle_gpu_s(np.zeros((2, 3)), 0.7, 5.0) == pytest.approx(3 * (2 * PEAK_S + 5.0))


def test_load_tests_end_with_a_mesh_that_keeps_the_promise(tmp_path: Path) -> None:
    write_trace(tmp_path, [(number / 400, 4096, 2) for number in range(8000)])
    own = scenario(objective={"ttft_p99_s": 1.0}, sampling={"layers": 1}, mesh={"gateways": 8})
    tested = sized_for_objective(own, tmp_path, [1, 1], 0.7)
    assert tested.meets_objective
    assert not simulate(with_policy(own, "static", 1, 1), tmp_path).meets_objective
    peak = sized_for_peak(tested, tmp_path, 0.7)
    assert list(peak.scenario.scaling.replicas) == [
        max(own, busy)
        for own, busy in zip(
            tested.scenario.scaling.replicas, for_busiest(tested.outcome, 0.7), strict=True
        )
    ]
    busy_s = busy_replicas_WG(peak.outcome).sum() * PEAK_S
    assert busy_s == pytest.approx(peak.numbers["busy_frac"] * peak.outcome.gpu_s, rel=0.1)
