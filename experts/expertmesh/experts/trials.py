"""Rows of zeros through a replica's experts: is it well, what do batches cost, is a guest sound."""

import asyncio
import time

import torch

from expertmesh.experts.batch import PackedRows
from expertmesh.experts.batcher import MicroBatcher
from expertmesh.experts.loading import LoadedExperts
from expertmesh.runtime.errors import ExpertMeshError, InternalError, QueueFull
from expertmesh.runtime.tensors import dtype_name

_REHEARSAL = ((1, 1), (4, 1), (1, 32), (1, 1), (4, 1), (1, 32))
"""(experts, rows of each) of the batches by which a new replica learns its costs."""
_RETRY_S = 0.05
_PATIENCE_S = 2.0  # well below Serve's HEALTH_TIMEOUT_S


class Trials:
    """By the same queue and thread as everyone's rows, but in batches of their own: sharing a
    product with a caller's rows would change the caller's bits."""

    def __init__(self, loaded: LoadedExperts, batcher: MicroBatcher) -> None:
        self._loaded, self._batcher = loaded, batcher

    async def check_health(self) -> None:
        """One row through one expert.

        If it waits for its turn while others' rows are computed, the replica is busy, not sick: to
        replace it for that would lose the rows in its queue, and leave more to those that are left.

        Raises:
            InternalError: the answer has the wrong form or is not finite.
        """
        try:
            rows_RD = await self._trial_unless_busy()
        except ExpertMeshError as error:
            if error.retryable:  # full or draining: busy, not sick
                return
            raise
        if rows_RD is not None:
            self._check(rows_RD)

    async def _trial_unless_busy(self) -> torch.Tensor | None:
        """The outputs of a trial, or None if it waits while others' rows are being computed."""
        trial, stats = asyncio.ensure_future(self._trial(1, 1)), self._batcher.stats
        try:
            while True:
                done_rows = stats.done_rows
                await asyncio.wait([trial], timeout=_PATIENCE_S)
                if trial.done():
                    return trial.result()
                if stats.done_rows > done_rows or stats.is_on_time(time.monotonic()):
                    return None
        finally:
            trial.cancel()

    async def rehearse(self) -> None:
        """Learn what batches cost before anyone sends some: unknown replicas are asked too often or
        never."""
        for num_experts, rows_each in _REHEARSAL:
            await self._trial(num_experts, rows_each)

    async def try_out(self, layer: int, expert: int) -> None:
        """One row through this expert. All rows queued before for its layer are done after it.

        Raises:
            InternalError: as `check_health`.
            Draining: the replica leaves.
        """
        rows = PackedRows(layer, (expert,), (1,), self._zeros(1))
        while True:
            try:
                self._check((await self._batcher.submit(rows, alone=True)).rows_RD)
            except QueueFull:
                await asyncio.sleep(_RETRY_S)
            else:
                return

    async def _trial(self, num_experts: int, rows_each: int) -> torch.Tensor:
        """The outputs of rows through the first experts of a layer."""
        layer, experts = self._loaded.experts_to_try(num_experts)
        is_ready = self._loaded.is_ready(layer, experts)
        num_rows = len(experts) * rows_each
        rows = PackedRows(layer, experts, (rows_each,) * len(experts), self._zeros(num_rows))
        done = await self._batcher.submit(rows, alone=True)
        if is_ready:
            self._batcher.stats.fit.observe(len(experts), num_rows, done.compute_s * 1e6)
        return done.rows_RD

    def _zeros(self, num_rows: int) -> torch.Tensor:
        return torch.zeros(num_rows, self._loaded.hidden_size, dtype=self._loaded.dtype)

    def _check(self, rows_RD: torch.Tensor) -> None:
        if rows_RD.shape != (1, self._loaded.hidden_size) or not bool(rows_RD.isfinite().all()):
            got = f"{dtype_name(rows_RD.dtype)}{list(rows_RD.shape)}"
            raise InternalError(f"a row of zeros through an expert gave {got}, not finite")
