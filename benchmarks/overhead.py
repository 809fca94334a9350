"""What one remote layer costs over computing it in place, beside the same bytes over bare gRPC.

One token, one expert in each of four groups. E experts, D hidden size, K top-k.
"""

import statistics
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.echo import EchoFanOut, echo_servers
from benchmarks.harness.in_place import InPlaceLayer
from benchmarks.harness.mesh import BenchMesh, bench_mesh, event_loop
from benchmarks.harness.report import Bar, Report
from benchmarks.harness.stages import stage_times_us
from benchmarks.harness.turns import ClosedLoop, Contestant, Turn, Turns, ratio, summary, take_turns
from expertmesh.v1 import router_pb2

GROUPS = 4
SHAPES = {
    "demo layer": MoeShape(hidden_size=128, ffn_size=256, top_k=GROUPS),
    "h=512 layer": MoeShape(hidden_size=512, ffn_size=1408, top_k=GROUPS),
}
BOUND = 1.5
OURS, OVER_GRPC = "ours", "ours over gRPC"
_HEADER_BYTES = 40
"""Of a request beside its row, about."""
_ABOUT = (
    "One token through four experts, one in each of four groups: **ours** (a blocking call of the "
    "model's thread, router core in this process, each replica in its own; over Unix sockets, as "
    "between processes of one host, and over gRPC, as between hosts), **in place** (the "
    "same experts one after the other in this process, one thread) and **raw** (four gRPC "
    "streams that echo the same number of bytes: one event loop, no model thread, no torch). "
    "Overhead is ours minus in place."
)


def _compete(shape: MoeShape, rounds: int, seconds: float) -> tuple[Turns, dict[str, float]]:
    torch.set_num_threads(1)
    hidden_1D = torch.randn(1, shape.hidden_size)
    per_group = shape.num_experts // GROUPS
    experts_1K = torch.arange(0, shape.num_experts, per_group)[None]
    weights_1K = torch.rand(1, GROUPS)
    with ExitStack() as stack:
        path = write_experts(shape, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        mesh: BenchMesh = stack.enter_context(bench_mesh(path, shape.num_experts, 1, GROUPS))
        remote: BenchMesh = stack.enter_context(
            bench_mesh(path, shape.num_experts, 1, GROUPS, local_socket=False)
        )
        servers = stack.enter_context(echo_servers(GROUPS))
        loop = stack.enter_context(event_loop())
        in_place = InPlaceLayer(path)
        message = bytes(4 * shape.hidden_size + _HEADER_BYTES)
        raw = EchoFanOut("raw", loop, servers, [message] * GROUPS, 1)
        stack.callback(raw.close)

        def ours(over: BenchMesh = mesh) -> torch.Tensor:
            slot_sum = router_pb2.COMBINE_SLOT_SUM
            return over.caller.dispatch(0, hidden_1D, experts_1K, weights_1K, slot_sum)

        def local() -> torch.Tensor:
            return in_place.dispatch(hidden_1D, experts_1K, weights_1K)

        assert torch.equal(ours(), local()), "ours and in place differ"
        contestants: list[Contestant] = [
            ClosedLoop(OURS, ours, 1, mesh.pids, warm_up=50),
            ClosedLoop(OVER_GRPC, lambda: ours(remote), 1, remote.pids, warm_up=50),
            ClosedLoop("in place", local, 1, warm_up=50),
            raw,
        ]
        turns = take_turns(contestants, rounds, seconds)
        return turns, stage_times_us(ours, calls=round(500 * seconds))


def _overhead_ratio(turns: Turns, name: str) -> float:
    """Median over the rounds of (ours - in place) / raw, by the p50s of each round."""
    rounds: Iterable[tuple[Turn, Turn, Turn]] = zip(
        turns[name], turns["in place"], turns["raw"], strict=True
    )
    return statistics.median((o.p50_s - i.p50_s) / r.p50_s for o, i, r in rounds)


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("overhead", _ABOUT)
    for name, shape in SHAPES.items():
        turns, stages_us = _compete(shape, *((2, 0.2) if quick else (7, 2.0)))
        report.bars += [
            Bar(
                f"{name}: overhead of {who} / raw", _overhead_ratio(turns, who), BOUND, at_most=True
            )
            for who in (OURS, OVER_GRPC)
        ]
        report.tables[f"{name}: D={shape.hidden_size}, F={shape.ffn_size}, float32"] = [
            {"contestant": who, **summary(own)} for who, own in turns.items()
        ]
        report.tables[f"{name}: where the time of a call goes"] = [
            {"from the start of the call until": what, "p50 us": value}
            for what, value in stages_us.items()
        ]
        report.raw[name] = {"ours / raw, p50": ratio(turns, OURS, "raw")}
    return report
