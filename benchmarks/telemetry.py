"""What it costs to send traces and metrics to a collector.

T tokens, D hidden size, K top-k.
"""

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.collector import collector_process
from benchmarks.harness.mesh import BenchMesh, bench_mesh
from benchmarks.harness.report import Bar, Report, Row
from benchmarks.harness.turns import ClosedLoop, ratio, summary, take_turns
from expertmesh.v1 import router_pb2

CALLERS = (1, 8)
GROUPS = 4
BOUND = 0.97
_SHAPE = MoeShape(hidden_size=512, ffn_size=1408)
_TOKENS = 16
_ABOUT = (
    f"A layer call of {_TOKENS} tokens (8 experts, top-2, D={_SHAPE.hidden_size}, "
    f"F={_SHAPE.ffn_size}, {GROUPS} groups) with telemetry off and with the default settings and a "
    "collector on the same two cores, whose CPU time counts: metrics of every call, and spans of "
    "the traces that are sampled. Bar: throughput on / off."
)


def _calls(mesh: BenchMesh, callers: int, stack: ExitStack) -> Callable[[], object]:
    """A call of each caller at once."""
    pool = stack.enter_context(ThreadPoolExecutor(callers))
    hidden_TD = torch.randn(_TOKENS, _SHAPE.hidden_size)
    experts_TK = torch.rand(_TOKENS, _SHAPE.num_experts).topk(2).indices
    weights_TK = torch.rand(_TOKENS, 2)

    def one(_: int) -> torch.Tensor:
        slot_sum = router_pb2.COMBINE_SLOT_SUM
        return mesh.caller.dispatch(0, hidden_TD, experts_TK, weights_TK, slot_sum)

    return lambda: list(pool.map(one, range(callers)))


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("telemetry", _ABOUT)
    torch.set_num_threads(1)
    rows: list[Row] = []
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = write_experts(_SHAPE, root)
        collector, endpoint = stack.enter_context(collector_process())
        off = stack.enter_context(bench_mesh(path, _SHAPE.num_experts, 1, GROUPS))
        on = stack.enter_context(
            bench_mesh(path, _SHAPE.num_experts, 1, GROUPS, otlp_endpoint=endpoint)
        )
        for callers in CALLERS:
            tokens = callers * _TOKENS
            contestants = [
                ClosedLoop("off", _calls(off, callers, stack), tokens, off.pids, warm_up=20),
                ClosedLoop(
                    "on",
                    _calls(on, callers, stack),
                    tokens,
                    lambda: [collector, *on.pids()],
                    warm_up=20,
                ),
            ]
            turns = take_turns(contestants, *((2, 0.3) if quick else (9, 2.0)))
            frac = ratio(turns, "on", "off", lambda turn: turn.tokens_per_s)
            report.bars.append(Bar(f"{callers} callers: throughput on / off", frac, BOUND))
            rows += [
                {"callers": callers, "telemetry": who, **summary(own)} for who, own in turns.items()
            ]
    report.tables["Layer calls"] = rows
    return report
