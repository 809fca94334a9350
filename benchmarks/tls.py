"""What encryption costs a layer call: mutual TLS beside plaintext, both over gRPC.

T tokens, D hidden size, K experts per token.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.certificates import Authority
from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.mesh import BenchMesh, bench_mesh
from benchmarks.harness.report import Report
from benchmarks.harness.turns import ClosedLoop, ratio, summary, take_turns
from expertmesh.runtime.security.server import mesh_access
from expertmesh.v1 import router_pb2

GROUPS = 2
SHAPE = MoeShape(hidden_size=512, ffn_size=1408)
TOKENS = (1, 256)
PLAINTEXT, MUTUAL = "plaintext", "mutual TLS"
_ABOUT = (
    "A layer call through two groups, D=512, float32, as between processes of different hosts: "
    "**plaintext** and **mutual TLS** (TLS 1.3, ECDSA certificates, AES-GCM by gRPC's own "
    "BoringSSL). No bar: it says what `security.tls` costs."
)


@contextmanager
def _meshes() -> Iterator[dict[str, BenchMesh]]:
    """The same experts behind plaintext and behind TLS."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = write_experts(SHAPE, folder / "model")
        tls = Authority(folder / "pki").of_mesh("default").tls()
        ways: dict[str, dict[str, Any]] = {
            PLAINTEXT: {},
            MUTUAL: {"access": mesh_access(tls, "default"), "tls": tls.model_dump(mode="json")},
        }
        yield {
            name: stack.enter_context(
                bench_mesh(path, SHAPE.num_experts, 1, GROUPS, local_socket=False, **way)
            )
            for name, way in ways.items()
        }


def _loop(name: str, mesh: BenchMesh, num_tokens: int) -> ClosedLoop:
    random = torch.Generator().manual_seed(num_tokens)
    hidden_TD = torch.randn(num_tokens, SHAPE.hidden_size, generator=random)
    scores_TE = torch.rand(num_tokens, SHAPE.num_experts, generator=random)
    weights_TK, experts_TK = scores_TE.topk(SHAPE.top_k)

    def call() -> torch.Tensor:
        slot_sum = router_pb2.COMBINE_SLOT_SUM
        return mesh.caller.dispatch(0, hidden_TD, experts_TK, weights_TK, slot_sum)

    return ClosedLoop(name, call, num_tokens, mesh.pids, warm_up=30)


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("tls", _ABOUT)
    with _meshes() as meshes:
        for num_tokens in TOKENS:
            loops = [_loop(name, mesh, num_tokens) for name, mesh in meshes.items()]
            turns = take_turns(loops, *((2, 0.2) if quick else (7, 2.0)))
            report.tables[f"T={num_tokens}"] = [
                {"contestant": who, **summary(own)} for who, own in turns.items()
            ]
            report.raw[f"T={num_tokens}"] = {"p50, ratio": ratio(turns, MUTUAL, PLAINTEXT)}
    return report
