"""Layer calls of a given size to a mesh, by one caller or many. Point by point for `growth`.

T tokens, D hidden size, E experts, K top-k.
"""

import itertools
import resource
import statistics
import threading
import time
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Self

import torch

from benchmarks.harness.mesh import BenchMesh
from benchmarks.harness.processes import cpu_seconds, with_descendants
from benchmarks.harness.turns import Turn
from expertmesh.v1 import router_pb2

_BATCHES = 8
_WARM_UP_CALLS = 8
_WARM_UP_S = 0.2
_LEAST_CALLS = 5


@dataclass(frozen=True)
class Load:
    """One call; the defaults are the base point."""

    rows: int = 16
    """Tokens of a call."""
    top_k: int = 2
    experts: int = 16
    groups: int = 4
    layers: int = 1
    """Dispatches of a call, one after the other, each to a layer of its own."""
    callers: int = 1
    """Threads that call at the same time."""


@dataclass(frozen=True)
class Spent:
    """What has been spent until now, or between two moments."""

    wall_s: float
    own_s: float
    """CPU time of this process: callers and router core."""
    served_s: float
    """CPU time of the replicas."""
    faults: float
    """Page faults of all of them: memory the kernel had to hand out."""

    @classmethod
    def now(cls, pids: Iterable[int]) -> Self:
        """By this process and by those of `pids`."""
        own_faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pids = list(pids)
        faults = own_faults + sum(_page_faults(pid) for pid in pids)
        return cls(time.perf_counter(), time.process_time(), cpu_seconds(pids), faults)

    def __sub__(self, earlier: "Spent") -> "Spent":
        pairs = zip(astuple(self), astuple(earlier), strict=True)
        return Spent(*(after - before for after, before in pairs))


class Callers:
    """A contestant: threads of this process, each in a closed loop over one mesh.

    Args:
        hidden_size: of the mesh's layers.
    """

    def __init__(self, name: str, load: Load, mesh: BenchMesh, hidden_size: int) -> None:
        self.name = name
        self.load = load
        self._mesh = mesh
        self._batches = [_batch(load, hidden_size, seed) for seed in range(_BATCHES)]
        self._next = itertools.cycle(self._batches)
        self.spent: list[Spent] = []
        """In each turn."""

    @property
    def experts_hit(self) -> float:
        """Distinct experts of a dispatch, on average over the batches."""
        return statistics.mean(len(experts) for experts in self._experts())

    @property
    def replicas_asked(self) -> float:
        """Distinct replicas of a dispatch, on average over the batches."""
        per_group = self.load.experts / self.load.groups
        return statistics.mean(len({int(e / per_group) for e in own}) for own in self._experts())

    def _experts(self) -> list[set[int]]:
        return [set(experts_TK.reshape(-1).tolist()) for _, experts_TK, _ in self._batches]

    def turn(self, seconds: float) -> Turn:
        """See `Contestant.turn`."""
        self._warm_up()
        pids = with_descendants(self._mesh.pids())
        latencies_s: list[float] = []
        started = Spent.now(pids)
        loop = (started.wall_s + seconds, latencies_s)
        threads = [threading.Thread(target=self._loop, args=loop) for _ in range(self.load.callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        spent = Spent.now(pids) - started
        self.spent.append(spent)
        return Turn(latencies_s, self.load.rows, spent.wall_s, spent.own_s + spent.served_s)

    def _warm_up(self) -> None:
        end_s = time.perf_counter() + _WARM_UP_S
        for _ in range(_WARM_UP_CALLS):
            self._call()
            if time.perf_counter() >= end_s:
                return

    def _loop(self, end_s: float, latencies_s: list[float]) -> None:
        now_s = time.perf_counter()
        for calls in itertools.count():
            if now_s >= end_s and calls >= _LEAST_CALLS:
                return
            self._call()
            done_s = time.perf_counter()
            latencies_s.append(done_s - now_s)
            now_s = done_s

    def _call(self) -> None:
        hidden_TD, experts_TK, weights_TK = next(self._next)
        slot_sum = router_pb2.COMBINE_SLOT_SUM
        for layer in range(self.load.layers):
            self._mesh.caller.dispatch(layer, hidden_TD, experts_TK, weights_TK, slot_sum)


def _page_faults(pid: int) -> int:
    """Minor ones, as nothing here is swapped; a process that has ended had none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[7])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _batch(
    load: Load, hidden_size: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(load.rows, hidden_size, generator=random)
    scores_TE = torch.rand(load.rows, load.experts, generator=random)
    weights_TK, experts_TK = scores_TE.topk(load.top_k)
    return hidden_TD, experts_TK, weights_TK
