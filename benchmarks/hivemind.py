"""An MoE layer over the network: ours and hivemind's, with the same experts' shape.

T tokens, D hidden size, E experts, K top-k.
"""

import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.in_place import InPlaceLayer, with_threads
from benchmarks.harness.mesh import bench_mesh
from benchmarks.harness.peer import PeerRow, run_peer
from benchmarks.harness.report import Bar, Report, Row
from benchmarks.harness.turns import ClosedLoop, Contestant, Turn, summary
from expertmesh.services.callers import CoreCaller
from expertmesh.v1 import router_pb2

BATCHES = [1, 32, 256]
THREADS = 2
_ABOUT = (
    "8 experts D → 4D → D (GELU, float32), top-2, one client in a closed loop, one server with two "
    "threads. **hivemind** 1.1.12 runs as shipped (`moe`: one call per row and expert) and with "
    "its transport at its best (`grouped`: one call per active expert, gate in the client); its "
    "expert also adds its input and a LayerNorm. **ours**: gate in the client, router core in the "
    "client, one replica. **in place**: our experts in the client's process with two threads, one "
    "product after another and as one grouped_mm. Contestants take turns; every ratio is the "
    "median over the rounds of two neighbours in time."
)

Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Rounds = dict[tuple[int, str], list[Turn | PeerRow]]
"""By (batch, contestant): one entry a round."""


def _rounds(hidden_size: int, rounds: int, seconds: float, batches: list[int]) -> Rounds:
    shape = MoeShape(hidden_size, 4 * hidden_size, gated=False)
    done: Rounds = {}
    with ExitStack() as stack:
        path = write_experts(shape, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        mesh = stack.enter_context(bench_mesh(path, shape.num_experts, 1, 1, threads=THREADS))
        gate_ED = torch.randn(shape.num_experts, hidden_size)
        places = {
            "in place, loop": InPlaceLayer(path),
            "in place, grouped_mm": InPlaceLayer(path, grouped=True),
        }
        for _ in range(rounds):
            for (batch, mode), row in run_peer(hidden_size, batches, seconds).items():
                done.setdefault((batch, f"hivemind {mode}"), []).append(row)
            for batch in batches:
                layers: dict[str, Layer] = {name: place.dispatch for name, place in places.items()}
                remote = _remote(mesh.caller)
                contestants = _contestants(batch, gate_ED, layers, remote, mesh.pids)
                for contestant in contestants:
                    turn = contestant.turn(seconds)
                    done.setdefault((batch, contestant.name), []).append(turn)
    return done


def _remote(caller: CoreCaller) -> Layer:
    def dispatch(
        hidden_TD: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        slot_sum = router_pb2.COMBINE_SLOT_SUM
        return caller.dispatch(0, hidden_TD, experts_TK, weights_TK, slot_sum)

    return dispatch


def _contestants(
    batch: int,
    gate_ED: torch.Tensor,
    places: dict[str, Layer],
    remote: Layer,
    pids: Callable[[], list[int]],
) -> list[Contestant]:
    hidden_TD = torch.randn(batch, gate_ED.shape[1])

    def layer(run: Layer, threads: int) -> Callable[[], object]:
        def call() -> torch.Tensor:
            top_TK, experts_TK = (hidden_TD @ gate_ED.t()).topk(2, dim=-1)
            return run(hidden_TD, experts_TK, torch.softmax(top_TK, dim=-1))

        return with_threads(call, threads)

    ours = layer(remote, 1)
    routing = (torch.rand(batch, len(gate_ED)).topk(2).indices, torch.rand(batch, 2))
    expected_TD = remote(hidden_TD, *routing)
    for place in places.values():
        torch.testing.assert_close(place(hidden_TD, *routing), expected_TD, rtol=0, atol=1e-3)
    return [
        ClosedLoop("ours", ours, batch, pids, least=3),
        *(
            ClosedLoop(name, layer(place, THREADS), batch, least=3)
            for name, place in places.items()
        ),
    ]


def _row(batch: int, name: str, done: list[Turn | PeerRow]) -> Row:
    turns = [turn for turn in done if isinstance(turn, Turn)]
    if turns:
        return {"batch": batch, "contestant": name, **summary(turns)}
    keys = ("p10_ms", "p50_ms", "p99_ms", "tokens_per_s", "cpu_ms_per_token")
    rows = [row for row in done if not isinstance(row, Turn)]
    medians = {key: statistics.median(row[key] for row in rows) for key in keys}
    return {"batch": batch, "contestant": name, "calls": sum(row["n"] for row in rows), **medians}


def _better(done: Rounds, batch: int, than: str, *, latency: bool = False) -> float:
    """How many times better ours is, in latency or in throughput."""

    def of(turn: Turn | PeerRow) -> float:
        if isinstance(turn, Turn):
            return 1 / turn.p50_s if latency else turn.tokens_per_s
        return 1e3 / turn["p50_ms"] if latency else turn["tokens_per_s"]

    pairs = zip(done[batch, "ours"], done[batch, than], strict=True)
    return statistics.median(of(ours) / of(theirs) for ours, theirs in pairs)


def _bars(done: Rounds, hidden_size: int) -> list[Bar]:
    name = f"D={hidden_size}"
    wanted = {512: (4.0, 8.0, 20.0), 2048: (1.1, 10.0, 10.0)}[hidden_size]
    bars = []
    for batch, bound in zip(BATCHES, wanted, strict=True):
        what = "p50" if batch == 1 else "throughput"
        better = _better(done, batch, "hivemind moe", latency=batch == 1)
        bars.append(
            Bar(f"{name}, batch {batch}: {what} against hivemind as shipped", better, bound)
        )
    if hidden_size == 512:
        for batch in BATCHES:
            better = _better(done, batch, "hivemind grouped", latency=batch == 1)
            bars.append(
                Bar(f"{name}, batch {batch}: against its transport at its best", better, 1.3)
            )
    else:
        floors = ("in place, loop", "in place, grouped_mm")
        floor = min(_better(done, 256, place) for place in floors)
        bars.append(Bar(f"{name}, batch 256: throughput against the best in place", floor, 0.85))
    return bars


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("hivemind", _ABOUT)
    batches = [1] if quick else BATCHES
    for hidden_size, rounds in ((512, 3), (2048, 2)):
        done = _rounds(hidden_size, 1 if quick else rounds, 0.5 if quick else 2.5, batches)
        if not quick:
            report.bars += _bars(done, hidden_size)
        rows = [_row(batch, name, own) for (batch, name), own in sorted(done.items())]
        report.tables[f"D={hidden_size}, F={4 * hidden_size}"] = rows
    return report
