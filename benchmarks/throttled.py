"""Two replicas of a group, one of them half as fast: who gets how many rows.

T tokens, D hidden size, K top-k.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch

from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.mesh import BenchMesh, bench_mesh
from benchmarks.harness.report import Bar, Report, Row
from benchmarks.harness.turns import ClosedLoop, Turn, ratio, summary, take_turns
from expertmesh.router.core import RouterCore
from expertmesh.router.waterfill import Shares
from expertmesh.v1 import router_pb2

SHAPE = MoeShape(hidden_size=512, ffn_size=2048, dtype="bfloat16")
TOKENS = 1024
SLOWDOWNS = (1, 2)
_ABOUT = (
    f"A layer of 8 experts, top-2, D={SHAPE.hidden_size}, F={SHAPE.ffn_size}, bfloat16, calls of "
    f"{TOKENS} tokens; two replicas hold all experts, in a process each. The second computes "
    "every batch twice: a device half as fast. Nobody is told. **uniform** "
    "sends the rows of each expert in equal parts to its holders, as engines do that draw a copy "
    "for each token; **experts at random** sends all rows of an expert to one of them; **ours** "
    "pours them by the costs that the replicas have learned. Twice the rows on the fast one are "
    "1.5 times the throughput of halves, less whatever is not compute."
)


def uniform(_: int, rows: Mapping[int, int], holders: Mapping[int, Sequence[str]]) -> Shares:
    """Every expert's rows in equal parts to its holders."""
    shares: Shares = {}
    for expert, count in rows.items():
        names = holders[expert]
        parts = [(count + own) // len(names) for own in range(len(names))]
        shares[expert] = [(n, part) for n, part in zip(names, parts, strict=True) if part]
    return shares


def at_random(random: Random) -> Callable[..., Shares]:
    """Every expert to one of its holders, whatever they have to do."""

    def share(_: int, rows: Mapping[int, int], holders: Mapping[int, Sequence[str]]) -> Shares:
        return {e: [(random.choice(holders[e]), count)] for e, count in rows.items()}

    return share


@contextmanager
def _sharing_by(core: RouterCore, share: Callable[..., Shares] | None) -> Iterator[None]:
    if share:
        core._share = share  # type: ignore[method-assign]
    try:
        yield
    finally:
        core.__dict__.pop("_share", None)


class _Contestant:
    """Layer calls with one way of sharing rows out."""

    def __init__(self, name: str, mesh: BenchMesh, share: Callable[..., Shares] | None) -> None:
        self.name = name
        self._mesh = mesh
        self._share = share
        self.done_rows = [0, 0]

    def turn(self, seconds: float) -> Turn:
        """See `benchmarks.harness.turns.Contestant`."""
        core = self._mesh.caller.core
        assert core is not None
        random = torch.Generator().manual_seed(1)
        hidden_TD = torch.randn(TOKENS, SHAPE.hidden_size, generator=random).bfloat16()
        weights_TK, experts_TK = torch.rand(TOKENS, 8, generator=random).topk(SHAPE.top_k)
        slot_sum = router_pb2.COMBINE_SLOT_SUM
        call = lambda: self._mesh.caller.dispatch(0, hidden_TD, experts_TK, weights_TK, slot_sum)  # noqa: E731
        with _sharing_by(core, self._share):
            before = _done_rows(core)
            turn = ClosedLoop(self.name, call, TOKENS, self._mesh.pids, warm_up=3).turn(seconds)
            after = _done_rows(core)
        for own in range(2):
            self.done_rows[own] += after[own] - before[own]
        return turn


def _done_rows(core: RouterCore) -> list[int]:
    replicas = core.snapshot.replicas
    return [replicas[name].load.done_rows for name in ("g0#1", "g0#2")]


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("throttled", _ABOUT)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = write_experts(SHAPE, Path(folder))
        with bench_mesh(path, SHAPE.num_experts, 1, 1, SLOWDOWNS) as mesh:
            contestants = [
                _Contestant("ours", mesh, None),
                _Contestant("uniform", mesh, uniform),
                _Contestant("experts at random", mesh, at_random(Random(0))),
            ]
            turns = take_turns(contestants, *((1, 0.3) if quick else (9, 2.0)))
    rows: list[Row] = []
    for own in contestants:
        fast, slow = own.done_rows
        rows.append({"dispatch": own.name, **summary(turns[own.name]), "fast : slow": fast / slow})
    throughput = lambda turn: turn.tokens_per_s  # noqa: E731
    fast, slow = contestants[0].done_rows
    gain = ratio(turns, "ours", "uniform", throughput)
    report.bars = [
        Bar("rows of the fast replica to those of the slow one, at least", fast / slow, 1.8),
        Bar("rows of the fast one to those of the slow one, at most", fast / slow, 2.2, True),
        Bar("throughput against uniform dispatch", gain, 1.4),
    ]
    report.tables["Layer calls"] = rows
    return report
