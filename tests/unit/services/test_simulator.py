"""A mesh by a virtual clock: what queueing theory knows, conservation, faults, one seed."""

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from tests.unit.services.simulator_worlds import scenario, write_trace

from expertmesh.services.simulator.page import page
from expertmesh.services.simulator.studies import Run, fewest_replicas, simulate, with_policy

ENGINES = ("calls", "windows")
BURST = [(10.0 * (number // 15) + 0.05 * (number % 15), 300, 6) for number in range(30)]


def run(folder: Path, engine: str, **changes: Any) -> Run:
    """Simulate a small scenario on the trace that is there."""
    sampling = {"engine": engine, **changes.pop("sampling", {})}
    return simulate(scenario(sampling=sampling, **changes), folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_seed_gives_the_same_numbers_and_another_one_others(
    tmp_path: Path, engine: str
) -> None:
    write_trace(tmp_path, BURST)
    drift = {"kind": "lognormal", "drift_s": 10}
    first, again = (run(tmp_path, engine, popularity=drift) for _ in range(2))
    other = run(tmp_path, engine, popularity=drift, seed=7)
    assert first.numbers == again.numbers
    assert (first.outcome.latency_s == again.outcome.latency_s).all()
    assert (first.outcome.latency_s != other.outcome.latency_s).any()


def test_every_row_is_computed_once(tmp_path: Path) -> None:
    write_trace(tmp_path, BURST)
    outcome = run(tmp_path, "calls").outcome
    assert outcome.tokens == outcome.arrivals.tokens == 30 * (300 + 5)
    assert outcome.rows == outcome.tokens * 2 * 2  # top_k, layers
    assert outcome.failed == 0


def test_sampling_changes_neither_rows_nor_tokens(tmp_path: Path) -> None:
    write_trace(tmp_path, BURST)
    own = run(tmp_path, "windows", sampling={"layers": 1}).outcome
    assert own.rows == pytest.approx(own.tokens * 4)
    assert own.tokens == pytest.approx(own.arrivals.tokens, rel=0.01)


def test_rows_of_a_killed_replica_are_computed_elsewhere(tmp_path: Path) -> None:
    write_trace(tmp_path, BURST)
    faults = [{"kind": "kill", "at_s": 0.31 + 0.01 * number, "group": 0} for number in range(3)]
    slow = {"costs": {"row_us": 30.0}}
    killed = run(tmp_path, "calls", faults=faults, mesh=slow, scaling={"replicas": [4]}).outcome
    assert killed.lost == 3
    assert killed.failed == 0
    assert killed.tokens == killed.arrivals.tokens
    assert killed.rows >= killed.tokens * 4  # what was asked for again may have been done


@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_replica_requests_fail_until_another_one_is_ready(
    tmp_path: Path, engine: str
) -> None:
    write_trace(tmp_path, [(0.5 * number, 100, 4) for number in range(60)])
    faults = [{"kind": "kill", "at_s": 5.1, "group": 0}]
    found = run(tmp_path, engine, faults=faults, scaling={"replicas": [1]}).outcome
    failed_s = found.arrivals.times_s[np.isinf(found.latency_s)]
    assert len(failed_s)
    assert failed_s.min() >= 4.5
    assert failed_s.max() <= 5.1 + 4.5 * 1.3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["slow", "pause"])
def test_slow_and_paused_replicas_delay_requests_while_it_lasts(
    tmp_path: Path, kind: str, engine: str
) -> None:
    write_trace(tmp_path, [(0.5 * number, 200, 4) for number in range(60)])
    fault = {"kind": kind, "at_s": 10, "for_s": 5, "factor": 2000, "group": 0}
    found = run(tmp_path, engine, faults=[fault], scaling={"replicas": [1]}).outcome
    during = (found.arrivals.times_s >= 10) & (found.arrivals.times_s < 14)
    late = found.arrivals.times_s >= 20
    assert found.failed == 0
    assert found.latency_s[during].mean() > 3 * found.latency_s[late].mean()


def waits(folder: Path, busy_frac: float, seed: int) -> float:
    """Mean wait, in service times, of single rows that arrive at random."""
    random, at_s = Random(seed), 0.0
    requests = []
    for _ in range(4_000):
        at_s += random.expovariate(busy_frac / 0.01)
        requests.append((at_s, 1, 1))
    write_trace(folder, requests)
    costs = {"batch_us": 0, "expert_us": 0, "row_us": 1e4, "transport_us": 0, "layer_us": 0}
    found = run(
        folder,
        "calls",
        model={"layers": 1, "experts": 1, "top_k": 1},
        mesh={"groups": 1, "gateways": 0, "max_batch_rows": 1, "costs": costs},
        scaling={"replicas": [1]},
        sampling={"layers": 1},
    )
    assert found.numbers["busy_frac"] == pytest.approx(busy_frac, rel=0.05)
    return (float(found.outcome.ttft_s.mean()) - 0.01) / 0.01


@pytest.mark.parametrize("busy_frac", [0.3, 0.6])
def test_the_mean_wait_of_a_queue_is_what_theory_says(tmp_path: Path, busy_frac: float) -> None:
    """M/D/1: the mean wait is rho / (2 (1 - rho)) service times (Pollaczek and Khinchine)."""
    expected = busy_frac / (2 * (1 - busy_frac))
    assert waits(tmp_path, busy_frac, 6) == pytest.approx(expected, rel=0.08)


def test_both_engines_say_the_same_of_a_busy_mesh(tmp_path: Path) -> None:
    write_trace(tmp_path, [(0.01 * number, 20, 60) for number in range(24)])
    busy = {"costs": {"row_us": 100.0}, "gateways": 3}
    calls, windows = (
        run(tmp_path, engine, mesh=busy, sampling={"window_s": 0.02}).numbers for engine in ENGINES
    )
    assert 0.8 < windows["token_gap_p50_s"] / calls["token_gap_p50_s"] < 1.4
    assert 0.8 < windows["busy_frac"] / calls["busy_frac"] < 1.3


RULE = {"max_replicas": 8, "down_window_s": 10, "max_queue_delay_s": 0.5, "memory_s": 10}


def test_the_hot_group_is_scaled_and_the_others_are_not(tmp_path: Path) -> None:
    write_trace(tmp_path, [(0.05 * number, 500, 2) for number in range(600)])
    hot = {"kind": "zipf", "exponent": 3.0, "layers": "alike"}
    mesh = {"groups": 4, "costs": {"row_us": 100.0}, "gateways": 4}
    scaling = {"policy": "groups", "replicas": [1], "rule": RULE}
    model = {"top_k": 1}
    both = {
        policy: run(
            tmp_path, "windows", popularity=hot, mesh=mesh, scaling={**scaling, "policy": policy},
            model=model,
        )
        for policy in ("groups", "whole")
    }  # fmt: skip
    ready = np.array(both["groups"].outcome.series.ready)
    assert ready.max(0).max() >= 3
    assert ready.max(0).min() == 1
    whole = np.array(both["whole"].outcome.series.ready)
    assert (whole.max(0) == whole.max()).all()
    assert both["groups"].outcome.gpu_s < both["whole"].outcome.gpu_s


def test_gpu_seconds_are_those_of_all_replicas_from_start_to_end(tmp_path: Path) -> None:
    write_trace(tmp_path, [(0.0, 10, 1), (100.0, 10, 1)])
    static = run(tmp_path, "windows").outcome
    assert static.gpu_s == pytest.approx(4 * static.end_s)
    scaling = {"policy": "groups", "replicas": [4], "rule": {**RULE, "max_replicas": 4}}
    scaled = run(tmp_path, "windows", scaling=scaling).outcome
    ready = np.array(scaled.series.ready).sum(1)
    assert ready[0] == 8
    assert ready[-1] == 2
    assert 2 * scaled.end_s < scaled.gpu_s < 4 * scaled.end_s


def test_mixed_gpus_get_rows_by_their_speed(tmp_path: Path) -> None:
    write_trace(tmp_path, [(0.02 * number, 1500, 2) for number in range(40)])
    own = scenario(mesh={"groups": 1, "gpus": "l4,a100"}, sampling={"engine": "calls"})
    from expertmesh.services.simulator.calls import run_calls
    from expertmesh.services.simulator.world import build_world

    world = build_world(own, tmp_path)
    run_calls(world)
    slow, fast = (replica.rows for replica in world.fleet)
    assert fast > 1.5 * slow


def test_the_fewest_replicas_meet_the_objective_and_one_less_does_not(tmp_path: Path) -> None:
    write_trace(tmp_path, [(0.02 * number, 600, 2) for number in range(200)])
    own = scenario(mesh={"costs": {"row_us": 30.0}, "gateways": 8}, objective={"ttft_p99_s": 1.0})
    best = fewest_replicas(own, tmp_path, most=16)
    [count] = best.scenario.scaling.replicas
    assert best.meets_objective
    assert count > 1
    assert not simulate(with_policy(own, "static", count - 1), tmp_path).meets_objective


def test_the_page_needs_nothing_else_and_has_a_line_for_each_policy(tmp_path: Path) -> None:
    write_trace(tmp_path, BURST)
    runs = {"groups": run(tmp_path, "windows"), "static <b>": run(tmp_path, "windows")}
    html = page(scenario(), runs)
    assert html.count("<svg") == 5
    assert html.count("<polyline") >= 9
    assert "static &lt;b&gt;" in html
    assert "<script" not in html
    assert "http" not in html
