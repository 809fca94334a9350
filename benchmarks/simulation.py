"""What scaling each group by itself saves on real arrivals, simulated; and how far the simulator is
off a real mesh on the same arrivals.
"""

import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.mesh import BenchMesh, bench_mesh
from benchmarks.harness.report import RESULTS, Bar, Report, Row
from benchmarks.harness.turns import percentile
from expertmesh.services.simulator.arrivals import read_trace
from expertmesh.services.simulator.scenario import Scenario
from expertmesh.services.simulator.studies import Run, simulate
from expertmesh.v1 import router_pb2

OBJECTIVES_S = {"code": 5.0, "conv": 2.0}
GATEWAYS = {"code": 32, "conv": 8}
HINDSIGHT = {"code": (8, 10, 12, 16), "conv": (5, 6, 7, 8)}
"""Replicas of each group that are tried, for the fewest that meet the objective."""
RATE, GROUPS, PEAK_S = 40.0, 8, 10.0
SKEWED = {"kind": "lognormal", "sigma": 0.6, "layers": "alike", "drift_s": 120, "drift_frac": 0.25}
RULE = {
    "max_replicas": 64,
    "target_busy_frac": 0.8,
    "hysteresis_frac": 0.05,
    "max_queue_delay_s": 0.5,
    "catch_up_s": 4,
    "down_window_s": 20,
    "memory_s": 20,
    "lead_s": 5,
}
SHAPE = MoeShape(hidden_size=512, ffn_size=2048, num_experts=8, dtype="bfloat16")
CALL_TOKENS, LOADS = 64, (0.3, 0.6)
_ABOUT = (
    "**Scaling** (simulated): the first 29 minutes of the Azure LLM traces, 40 requests for each "
    "row; a Mixtral-8x7B on H100s, an expert in each of 8 groups, 32 gateways for code, 8 for "
    "conv; a replica needs 4 s and 2.8 s for its weights. **peak** is as many replicas as the "
    "busiest 10 s need at the rule's own target, the same all the time; **hindsight** the fewest "
    "of equal groups that meet the objective, which nobody knows before; **whole** gives all "
    "groups what the neediest needs; **groups** scales each by itself. **A real mesh**: layer "
    "calls at random times, two replicas that hold all experts, Redis and Unix sockets as in "
    "production; the simulator has the same arrivals, and its costs from calls on the idle mesh."
)


def _data() -> Path:
    return Path(os.environ.get("EXPERTMESH_DATA", RESULTS.parents[2] / "shared" / "data"))


# -- scaling -------------------------------------------------------------------------------------


def _scenario(trace: str, policy: str, replicas: int, popularity: dict[str, Any]) -> Scenario:
    return Scenario.model_validate(
        {
            "trace": {"file": f"azure_llm_2023_{trace}_first_half.csv", "rate": RATE},
            "mesh": {
                "groups": GROUPS,
                "gateways": GATEWAYS[trace],
                "gpus": "h100",
                "forward_tokens": 8192,
            },
            "popularity": popularity,
            "scaling": {"policy": policy, "replicas": [replicas], "rule": RULE},
            "objective": {"ttft_p99_s": OBJECTIVES_S[trace]},
            "sampling": {"layers": 1, "forwards": 4, "every_s": 20, "window_s": 0.5},
        }
    )


def _peak_replicas(trace: str, busy_s_per_token: float) -> int:
    """Of each group, for the busiest seconds at the rule's own target."""
    own = read_trace(_data() / f"azure_llm_2023_{trace}_first_half.csv")
    tokens = np.bincount((own.times_s / PEAK_S).astype(int), own.context + own.generated)
    demand = RATE * float(tokens.max()) / PEAK_S * busy_s_per_token
    return math.ceil(demand / float(RULE["target_busy_frac"]) / GROUPS)


def scaling(trace: str) -> tuple[dict[str, Run], dict[str, Run]]:
    """Runs of a trace by policy: with Mixtral's own counts that change from subject to subject, and
    with a skewed popularity that drifts."""
    counts = {"kind": "counts", "file": "mixtral_expert_popularity.json", "drift_s": 120}
    runs: dict[str, Run] = {}
    for replicas in HINDSIGHT[trace]:
        runs["hindsight"] = simulate(_scenario(trace, "static", replicas, counts), _data())
        if runs["hindsight"].meets_objective:
            break
    first = runs["hindsight"].numbers
    peak = _peak_replicas(trace, first["busy_frac"] * first["gpu_seconds"] / first["tokens"])
    runs["peak"] = simulate(_scenario(trace, "static", peak, counts), _data())
    skewed = {}
    for policy in ("whole", "groups"):
        runs[policy] = simulate(_scenario(trace, policy, 3, counts), _data())
        skewed[policy] = simulate(_scenario(trace, policy, 3, SKEWED), _data())
    return runs, skewed


def _scaling_row(name: str, run: Run, peak_gpu_s: float) -> Row:
    own = run.numbers
    return {
        "policy": name,
        "GPU-seconds": own["gpu_seconds"],
        "of peak": f"{own['gpu_seconds'] / peak_gpu_s:.0%}",
        "replicas, mean": own["mean_replicas"],
        "most": own["most_replicas"],
        "busy": f"{own['busy_frac']:.0%}",
        "first token p50, s": own["ttft_p50_s"],
        "p99, s": own["ttft_p99_s"],
        "resizes": own["resizes"],
        "objective": "met" if run.meets_objective else "MISSED",
    }


def _report_scaling(report: Report, trace: str, runs: dict[str, Run], skew: dict[str, Run]) -> None:
    gpu_s = {name: run.outcome.gpu_s for name, run in runs.items()}
    objective = f"first token p99 <= {OBJECTIVES_S[trace]:g} s"
    report.tables[f"{trace}, counts of Mixtral-8x7B by subject ({objective})"] = [
        _scaling_row(name, runs[name], gpu_s["peak"])
        for name in ("peak", "hindsight", "whole", "groups")
    ]
    report.tables[f"{trace}, lognormal 0.6, drifting ({objective})"] = [
        _scaling_row(name, run, gpu_s["peak"]) for name, run in skew.items()
    ]
    met = runs["groups"].numbers["ttft_p99_s"]
    skewed = skew["groups"].outcome.gpu_s / skew["whole"].outcome.gpu_s
    report.bars += [
        Bar(f"{trace}: p99 of the first token", met, OBJECTIVES_S[trace], True, "s"),
        Bar(f"{trace}: GPU-seconds of peak", gpu_s["groups"] / gpu_s["peak"], 0.6, True),
        Bar(f"{trace}: GPU-seconds of whole, skewed", skewed, 0.8, True),
    ]


def _big_day() -> tuple[Row, Bar]:
    """1,000 replicas, a day."""
    own = Scenario.model_validate(
        {
            "trace": {
                "file": "azure_llm_2023_conv_first_half.csv",
                "rate": 25,
                "duration_s": 86400,
                "daily_swing": 0.8,
            },
            "mesh": {"groups": 8, "gateways": 64, "gpus": "l4", "forward_tokens": 4096},
            "scaling": {"replicas": [125], "rule": {**RULE, "max_replicas": 125}, "decide_s": 15},
            "sampling": {"layers": 1, "forwards": 1, "every_s": 300, "window_s": 5},
        }
    )
    started_s = time.monotonic()
    run = simulate(own, _data())
    took_s = time.monotonic() - started_s
    row: Row = {
        "requests": run.numbers["requests"],
        "tokens": run.numbers["tokens"],
        "most replicas": run.numbers["most_replicas"],
        "mean": run.numbers["mean_replicas"],
        "first token p99, s": run.numbers["ttft_p99_s"],
        "planned calls": run.numbers["planned_calls"],
        "wall clock, s": took_s,
    }
    return row, Bar("a day of up to 1,000 replicas: wall clock", took_s / 60, 10, True, "min")


# -- a real mesh ---------------------------------------------------------------------------------


class _Caller:
    """Layer calls to a real mesh."""

    def __init__(self, mesh: BenchMesh) -> None:
        self._mesh = mesh
        random = torch.Generator().manual_seed(1)
        self._hidden_TD = torch.randn(CALL_TOKENS, SHAPE.hidden_size, generator=random).bfloat16()
        weights = torch.rand(CALL_TOKENS, SHAPE.num_experts, generator=random)
        self._weights_TK, self._experts_TK = weights.topk(SHAPE.top_k)

    def call(self) -> float:
        """One call; its seconds."""
        started_s = time.perf_counter()
        mode = router_pb2.COMBINE_SLOT_SUM
        self._mesh.caller.dispatch(0, self._hidden_TD, self._experts_TK, self._weights_TK, mode)
        return time.perf_counter() - started_s

    def at(self, times_s: Sequence[float]) -> list[float]:
        """Calls at these times, each in a thread; seconds from when it was due to its end."""
        found = [0.0] * len(times_s)
        begin_s = time.perf_counter() + 0.05

        def one(number: int) -> None:
            due_s = begin_s + times_s[number]
            time.sleep(max(0.0, due_s - time.perf_counter()))
            self.call()
            found[number] = time.perf_counter() - due_s

        threads = [threading.Thread(target=one, args=(own,)) for own in range(len(times_s))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def _simulated(times_s: Sequence[float], costs: dict[str, float], folder: Path) -> list[float]:
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for at_s in times_s:
        minutes, seconds = divmod(at_s, 60)
        lines.append(f"2024-01-01 12:{minutes:02.0f}:{seconds:09.6f},{CALL_TOKENS},1")
    (folder / "trace.csv").write_text("\n".join(lines) + "\n", "utf-8")
    own = Scenario.model_validate(
        {
            "trace": {"file": "trace.csv"},
            "model": {"layers": 1, "experts": SHAPE.num_experts, "top_k": SHAPE.top_k},
            "mesh": {"groups": 1, "gateways": 0, "gpus": "l4", "costs": costs},
            "scaling": {"policy": "static", "replicas": [2]},
            "sampling": {"engine": "calls", "layers": 1},
        }
    )
    latencies: list[float] = simulate(own, folder).outcome.ttft_s.tolist()
    return latencies


def _costs(mesh: BenchMesh, idle_s: float) -> dict[str, float]:
    """What replicas have learned that batches cost, and what else an idle call takes."""
    core = mesh.caller.core
    assert core is not None
    own = [replica.costs for replica in core.snapshot.replicas.values()]
    batch_us, expert_us, row_us = (
        statistics.fmean(getattr(costs, name) for costs in own)
        for name in ("batch_us", "expert_us", "row_us")
    )
    rows = CALL_TOKENS * SHAPE.top_k / 2
    compute_us = batch_us + expert_us * SHAPE.num_experts / 2 + row_us * rows
    rest_us = max(0.0, idle_s * 1e6 - compute_us)
    return {
        "batch_us": batch_us,
        "expert_us": expert_us,
        "row_us": row_us,
        "transport_us": rest_us,
        "layer_us": 0.0,
    }


def _real_mesh(calls: int) -> tuple[list[Row], float]:
    rows: list[Row] = []
    errors = []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_experts(SHAPE, folder)
        with bench_mesh(path, SHAPE.num_experts, 1, 1, (1, 1)) as mesh:
            caller = _Caller(mesh)
            idle_s = statistics.median([caller.call() for _ in range(60)][10:])
            costs = _costs(mesh, idle_s)
            for load in LOADS:
                random = np.random.default_rng(3)
                times_s = np.cumsum(random.exponential(idle_s / load, calls)).tolist()
                real, simulated = caller.at(times_s), _simulated(times_s, costs, folder)
                error = statistics.median(simulated) / statistics.median(real) - 1
                errors.append(abs(error))
                rows.append(
                    {
                        "calls a second": load / idle_s,
                        "real p50, ms": 1e3 * statistics.median(real),
                        "simulated p50, ms": 1e3 * statistics.median(simulated),
                        "error of p50": f"{error:+.0%}",
                        "real p95, ms": 1e3 * percentile(real, 0.95),
                        "simulated p95, ms": 1e3 * percentile(simulated, 0.95),
                    }
                )
    return rows, max(errors)


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("simulation", _ABOUT)
    if not quick:  # the traces are not part of this checkout
        with ProcessPoolExecutor(2) as pool:
            found = zip(OBJECTIVES_S, pool.map(scaling, OBJECTIVES_S), strict=True)
            for trace, (runs, skewed) in found:
                _report_scaling(report, trace, runs, skewed)
        row, bar = _big_day()
        report.tables["A day of a mesh of up to 1,000 replicas"] = [row]
        report.bars.append(bar)
    rows, error = _real_mesh(20 if quick else 300)
    report.tables["A real mesh of two replicas and the simulator, the same arrivals"] = rows
    report.bars.append(Bar("error of the median against a real mesh", error, 0.3, True))
    return report
