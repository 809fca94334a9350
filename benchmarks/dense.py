"""Sparse beside dense: an MoE layer through the mesh and dense FFNs in this process.

T tokens, D hidden size, F FFN size, K top-k.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.in_place import with_threads
from benchmarks.harness.mesh import BenchMesh, bench_mesh
from benchmarks.harness.report import Report, Row
from benchmarks.harness.turns import ClosedLoop, Contestant, ratio, summary, take_turns
from expertmesh.v1 import router_pb2

SHAPE = MoeShape(hidden_size=1024, ffn_size=3584)
"""A quarter of Mixtral 8x7B's widths, the same proportions."""
GROUPS = 2
BATCHES = (1, 32, 256)
_MIXTRAL_ACTIVE, _MIXTRAL_ALL = 12.9, 46.7  # billions of parameters, by its authors
_ABOUT = (
    f"8 experts, top-2, D={SHAPE.hidden_size}, F={SHAPE.ffn_size}, float32: Mixtral's layer at a "
    f"quarter of its widths. **ours** is the sparse layer in {GROUPS} groups over Unix sockets, "
    "one thread each; the dense FFNs compute in this process with two threads: one with the "
    "parameters of all "
    "8 experts, one with those of the 2 that a token uses. A token computes a quarter of the "
    f"layer's parameters; of all of Mixtral 8x7B {_MIXTRAL_ACTIVE / _MIXTRAL_ALL:.0%} "
    f"({_MIXTRAL_ACTIVE} of {_MIXTRAL_ALL} billion). A batch of 32 or more touches every expert: "
    "then sparse still computes a quarter, but reads as much memory as dense."
)


def _dense(hidden_TD: torch.Tensor, ffn_size: int) -> Callable[[], object]:
    hidden_size = hidden_TD.shape[1]
    gate_FD, up_FD = torch.randn(2, ffn_size, hidden_size).unbind()
    down_DF = torch.randn(hidden_size, ffn_size)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            gate_TF = functional.silu(functional.linear(hidden_TD, gate_FD))
            return functional.linear(gate_TF * functional.linear(hidden_TD, up_FD), down_DF)

    return with_threads(call, 2)


def _sparse(mesh: BenchMesh, hidden_TD: torch.Tensor) -> Callable[[], object]:
    experts_TK = torch.rand(len(hidden_TD), SHAPE.num_experts).topk(SHAPE.top_k).indices
    weights_TK = torch.rand(experts_TK.shape)
    slot_sum = router_pb2.COMBINE_SLOT_SUM
    call = mesh.caller.dispatch
    return with_threads(lambda: call(0, hidden_TD, experts_TK, weights_TK, slot_sum), 1)


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("dense", _ABOUT)
    rows: list[Row] = []
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = write_experts(SHAPE, root)
        mesh = stack.enter_context(bench_mesh(path, SHAPE.num_experts, 1, GROUPS))
        for batch in BATCHES[:1] if quick else BATCHES:
            hidden_TD = torch.randn(batch, SHAPE.hidden_size)
            all_F, active_F = (n * SHAPE.ffn_size for n in (SHAPE.num_experts, SHAPE.top_k))
            contestants: list[Contestant] = [
                ClosedLoop("ours, sparse", _sparse(mesh, hidden_TD), batch, mesh.pids, least=3),
                ClosedLoop("dense, all parameters", _dense(hidden_TD, all_F), batch, least=3),
                ClosedLoop("dense, active parameters", _dense(hidden_TD, active_F), batch, least=3),
            ]
            turns = take_turns(contestants, *((1, 0.2) if quick else (5, 1.5)))
            for name, own in turns.items():
                faster = ratio(turns, "ours, sparse", name, lambda turn: turn.tokens_per_s)
                rows.append(
                    {"batch": batch, "layer": name, **summary(own), "sparse is faster by": faster}
                )
    report.tables["One layer"] = rows
    return report
