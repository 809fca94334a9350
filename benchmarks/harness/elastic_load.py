"""An open loop of callers of single expert groups, whose answers are compared bit by bit.

T tokens, D hidden size, E experts, K top-k.
"""

import asyncio
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import TracebackType
from typing import NamedTuple, Self

import torch

from benchmarks.harness.checkpoints import MoeShape
from benchmarks.harness.in_place import InPlaceLayer
from benchmarks.harness.report import Row
from expertmesh.router.core import RouterCore

_CALLS = 16
_TIMEOUT_S = 120.0


class _Call(NamedTuple):
    hidden_TD: torch.Tensor
    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    expected_TD: torch.Tensor


class Pool:
    """Some calls for each group, and what a single process answers to them."""

    def __init__(self, path: Path, shape: MoeShape, tokens: int, groups: int) -> None:
        layer = InPlaceLayer(path)
        random = torch.Generator().manual_seed(0)
        share = shape.num_experts // groups
        self.calls: dict[str, list[_Call]] = {}
        for number in range(groups):
            own = []
            for _ in range(_CALLS):
                hidden_TD = torch.randn(tokens, shape.hidden_size, generator=random)
                scores_TE = torch.rand(tokens, share, generator=random)
                weights_TK, ranks_TK = scores_TE.topk(shape.top_k)
                experts_TK = ranks_TK + number * share
                expected_TD = layer.dispatch(hidden_TD, experts_TK, weights_TK)
                own.append(_Call(hidden_TD, experts_TK, weights_TK, expected_TD))
            self.calls[f"g{number}"] = own


@dataclass
class Tally:
    """What became of the calls."""

    latencies: list[tuple[float, float]] = field(default_factory=list)
    """(when it came, how long it took) in seconds."""
    errors: list[str] = field(default_factory=list)
    inexact: int = 0

    def row(self, name: str, begin_s: float, end_s: float) -> Row:
        """Calls that came in a part of the time."""
        own = sorted(took_s for at_s, took_s in self.latencies if begin_s <= at_s < end_s)
        if not own:
            return {"part": name, "calls": 0, "p50 ms": "", "p99 ms": "", "max ms": ""}
        median_ms = 1e3 * statistics.median(own)
        return {
            "part": name,
            "calls": len(own),
            "p50 ms": median_ms,
            "p99 ms": 1e3 * own[int(0.99 * len(own))],
            "max ms": 1e3 * own[-1],
        }


class Load:
    """Calls come as long as `async with` lasts; leaving waits for the answers.

    Args:
        rates: calls a second for each group; may be changed while it runs.
    """

    def __init__(
        self, core: RouterCore, pool: Pool, rates: Mapping[str, float], tally: Tally
    ) -> None:
        self._core = core
        self._pool = pool
        self.rates = rates
        self._tally = tally
        self._random = Random(0)
        self._running: set[asyncio.Task[None]] = set()
        self._sources: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._sources = [asyncio.create_task(self._source(group)) for group in self.rates]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for source in self._sources:
            source.cancel()
        await asyncio.gather(*self._sources, *self._running, return_exceptions=True)

    async def _source(self, group: str) -> None:
        """A caller comes whenever it is time, whatever became of those before."""
        next_s = time.monotonic()
        while True:
            next_s += self._random.expovariate(self.rates[group])
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            call = self._random.choice(self._pool.calls[group])
            task = asyncio.create_task(self._answer(call))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _answer(self, call: _Call) -> None:
        came_s = time.monotonic()
        try:
            got_TD = await self._core.dispatch(
                0, call.hidden_TD, call.experts_TK, call.weights_TK, "slot_sum", _TIMEOUT_S
            )
        except Exception as error:
            self._tally.errors.append(repr(error))
            return
        self._tally.latencies.append((came_s, time.monotonic() - came_s))
        self._tally.inexact += not torch.equal(got_TD, call.expected_TD)
