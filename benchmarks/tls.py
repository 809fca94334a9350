"""What encryption costs a layer call: mutual TLS beside plaintext, both over gRPC.

T tokens, D hidden size, K experts per token.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.harness.certificates import Authority
from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.mesh import BenchMesh, bench_mesh
from benchmarks.harness.report import Report
from benchmarks.harness.turns import ClosedLoop, Turns, ratio, summary, take_turns
from expertmesh.runtime.security.server import mesh_access
from expertmesh.v1 import router_pb2

GROUPS = 4
SHAPE = MoeShape(hidden_size=512, ffn_size=1408)
TOKENS = (1, 256)
PLAINTEXT, MUTUAL = "plaintext", "mutual TLS"
_ABOUT = (
    "A layer call through four groups, D=512, float32, as between processes of different hosts: "
    "**plaintext** and **mutual TLS** (TLS 1.3, ECDSA certificates, AES-GCM by gRPC's own "
    "BoringSSL). No bar: it says what `security.tls` costs."
)


def _compete(num_tokens: int, rounds: int, seconds: float) -> Turns:
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(num_tokens)
    hidden_TD = torch.randn(num_tokens, SHAPE.hidden_size, generator=random)
    scores_TE = torch.rand(num_tokens, SHAPE.num_experts, generator=random)
    weights_TK, experts_TK = scores_TE.topk(SHAPE.top_k)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = write_experts(SHAPE, folder / "model")
        tls = Authority(folder / "pki").of_mesh("default").tls()
        plain: BenchMesh = stack.enter_context(
            bench_mesh(path, SHAPE.num_experts, 1, GROUPS, local_socket=False)
        )
        access = mesh_access(tls, "default")
        secured: BenchMesh = stack.enter_context(
            bench_mesh(
                path,
                SHAPE.num_experts,
                1,
                GROUPS,
                access=access,
                local_socket=False,
                tls=tls.model_dump(mode="json"),
            )
        )

        def loop(name: str, mesh: BenchMesh) -> ClosedLoop:
            def call() -> torch.Tensor:
                return mesh.caller.dispatch(
                    0, hidden_TD, experts_TK, weights_TK, router_pb2.COMBINE_SLOT_SUM
                )

            return ClosedLoop(name, call, num_tokens, mesh.pids, warm_up=30)

        return take_turns([loop(PLAINTEXT, plain), loop(MUTUAL, secured)], rounds, seconds)


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("tls", _ABOUT)
    for num_tokens in TOKENS:
        turns = _compete(num_tokens, *((2, 0.2) if quick else (7, 2.0)))
        report.tables[f"T={num_tokens}"] = [
            {"contestant": who, **summary(own)} for who, own in turns.items()
        ]
        report.raw[f"T={num_tokens}"] = {"TLS / plaintext, p50": ratio(turns, MUTUAL, PLAINTEXT)}
    return report
