"""How far the simulator is off a real mesh that gets the same calls at the same times."""

import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.mesh import BenchMesh, bench_mesh
from benchmarks.harness.report import Bar, Report, Row
from benchmarks.harness.turns import percentile
from expertmesh.services.simulator.scenario import Scenario
from expertmesh.services.simulator.studies import simulate
from expertmesh.v1 import router_pb2

SHAPE = MoeShape(hidden_size=256, ffn_size=512, num_experts=8, dtype="bfloat16")
CALL_TOKENS, LOADS = 64, (0.3, 0.6)
ROW_S = 0.0004
"""A replica's device takes so long for a row: it sleeps, as replicas, router and caller share the
cores of one machine, which those of the simulator do not."""
IDLE_GAP_S = 0.1
"""Between calls to the idle mesh: with no gap nobody has to be woken, and they take half as long as
one that comes by itself."""
_ABOUT = (
    "Layer calls at random times to two real replicas that hold all experts, with Redis and Unix "
    "sockets as in production; the simulator (`engine: calls`) has the same arrivals, and its "
    "costs from calls on the idle mesh. A replica's device takes 0.4 ms for a row: it sleeps, as "
    "replicas, router and caller share the cores of one machine, which those of the simulator do "
    "not."
)


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
        with bench_mesh(path, SHAPE.num_experts, 1, 1, (1, 1), row_delay_s=ROW_S) as mesh:
            caller = _Caller(mesh)
            idle_s = statistics.median(caller.at([IDLE_GAP_S * own for own in range(60)])[10:])
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
    report = Report("fidelity", _ABOUT)
    rows, error = _real_mesh(20 if quick else 300)
    report.tables["A real mesh of two replicas and the simulator, the same arrivals"] = rows
    report.bars.append(Bar("error of the median against a real mesh", error, 0.3, True))
    return report
