"""Batches for a replica's device: rows of one layer, across callers, one batch.

While a batch computes, arriving rows queue up (`work_queue.py`); the next batch takes the queued
rows of the layer whose turn it is, up to a row budget. A batch that is not full may wait a little
for more.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

from expertmesh.experts.batch import Computed, PackedRows, experts_of, merge, split
from expertmesh.experts.limits import BatchLimits
from expertmesh.experts.load_stats import LoadStats
from expertmesh.experts.work import Work
from expertmesh.experts.work_queue import WorkQueue
from expertmesh.runtime.errors import Draining, ExpertMeshError, InternalError
from expertmesh.runtime.origin import ANYONE, Origin

logger = logging.getLogger(__name__)


class MicroBatcher:
    """Runs `compute` on one thread, batch after batch.

    Args:
        compute: outputs [R, D] of packed rows; runs on the batcher's own thread.
        clock: seconds, monotonic.
        merge: whether rows of different requests may share a matrix product. If not, requests of a
            batch are computed one after the other, each as if it were alone.
        on_batch: told the rows and the compute time (s) of each batch.
        is_ready: whether experts of a layer can be computed without waiting for anything; others
            never are on the event loop.
    """

    def __init__(
        self,
        compute: Callable[[PackedRows], torch.Tensor],
        limits: BatchLimits,
        clock: Callable[[], float],
        *,
        merge: bool = True,
        on_batch: Callable[[int, float], None] = lambda num_rows, compute_s: None,
        is_ready: Callable[[int, Sequence[int]], bool] = lambda layer, experts: True,
    ) -> None:
        self._compute = compute
        self._clock = clock
        self._merge = merge
        self._on_batch = on_batch
        self.is_ready = is_ready
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        # OpenMP's number of threads belongs to the thread; asking torch for it makes torch set it
        self._thread = ThreadPoolExecutor(1, "expertmesh-compute", torch.get_num_threads)
        self._task: asyncio.Task[None] | None = None
        self._draining = False
        self.stats = LoadStats()
        self._queue = WorkQueue(limits, self.stats, clock, merge)
        self._free_s = 0.0
        """When the last batch was done."""

    @property
    def limits(self) -> BatchLimits:
        """Bounds and rhythms, changed while running."""
        return self._queue.limits

    @limits.setter
    def limits(self, limits: BatchLimits) -> None:
        self._queue.limits = limits

    @property
    def num_callers(self) -> int:
        """How many share the device, about."""
        return self._queue.num_callers

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="micro-batcher")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._task
        self._draining = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._queue.fail_all(Draining("the replica has stopped"))
        self._thread.shutdown(wait=False)

    async def submit(
        self,
        rows: PackedRows,
        timeout_s: float | None = None,
        *,
        origin: Origin = ANYONE,
        alone: bool = False,
    ) -> Computed:
        """Queue the rows and wait for their outputs.

        Args:
            origin: whose they are; callers get equal shares, interactive ones come first.
            alone: never share a batch.

        Raises:
            QueueFull: `max_queue_rows` or `max_queue_bytes` would be exceeded and nobody has more
                than their share of them, or the rows have lost their place to who had less.
            CannotMakeIt: what waits leaves too little of `timeout_s`.
            Draining: the replica takes no more work.
            DeadlineExceeded: `timeout_s` passed before the rows were computed.
        """
        layer, experts = rows.layer, rows.experts
        if not alone and self.computes_at_once(rows.num_rows) and self.is_ready(layer, experts):
            return self.compute_now(rows)
        self._check_open()
        work = self._queue.add(rows, origin, timeout_s, alone)
        self.stats.arrived_rows += 0 if alone else rows.num_rows  # a health check is no load
        self._idle.clear()
        self._arrived.set()
        try:
            return await work.answer
        finally:
            self._queue.take_out(work)
            self._queue.answered(work)
            if not self.stats.queued_rows:
                self._idle.set()

    def computes_at_once(self, num_rows: int) -> bool:
        """Whether that few rows are better computed where they arrive, by `compute_now`."""
        return not self.stats.queued_rows and self._is_short(num_rows)

    def _is_short(self, num_rows: int) -> bool:
        """Whether the rows take less than a change of threads and back may."""
        expected_us = self.stats.row_time_us * num_rows
        return 0 < expected_us <= self.limits.at_once_s * 1e6 and not self.limits.max_wait_s

    def compute_now(self, rows: PackedRows) -> Computed:
        """On the event loop: for a few rows shorter than handing them to the thread and back.

        Raises:
            QueueFull, Draining: as `submit`.
        """
        self._check_open()
        num_rows, stats = rows.num_rows, self.stats
        self._queue.check_room(num_rows, rows.rows_RD.nbytes)
        stats.arrived_rows += num_rows
        started_s = self._clock()
        try:
            rows_RD = self._compute(rows)
        except Exception as error:
            raise self._failed(error) from error
        compute_s = self._clock() - started_s
        self._account(num_rows, len(rows.experts), 0.0, compute_s, is_ready=True)
        return Computed(rows_RD, 0.0, compute_s, num_rows)

    def _failed(self, error: Exception) -> ExpertMeshError:
        if isinstance(error, ExpertMeshError):  # ours and meant for the caller
            return error
        logger.error("a batch failed", exc_info=error)
        return InternalError("the batch failed; see the replica's log")

    def _account(
        self,
        num_rows: int,
        num_experts: int,
        queue_s: float,
        compute_s: float,
        is_ready: bool,
        waited_row_s: float = 0.0,
    ) -> None:
        self.stats.observe(num_rows, queue_s, compute_s, waited_row_s)
        if is_ready:  # loads of weights have a price of their own
            self.stats.fit.observe(num_experts, num_rows, compute_s * 1e6)
        self._on_batch(num_rows, compute_s)

    def _check_open(self) -> None:
        if self._draining:
            raise Draining("the replica is draining; send the rows to another one")

    def oldest_wait_s(self) -> float:
        """How long the oldest row that is not being computed has waited; 0 if there is none."""
        return self._queue.oldest_wait_s()

    async def drain(self) -> None:
        """Refuse new rows and wait until the admitted ones are answered."""
        self._draining = True
        await self._idle.wait()

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            await self._fill()
            batch = self._queue.take()
            if not self._queue:
                self._arrived.clear()
            if batch:
                await self._answer(batch)

    async def _fill(self) -> None:
        """Wait for a fuller batch, but no longer than `max_wait_s` after the first arrived."""
        while head := self._queue.head():
            left_s = head.arrived_s + self.limits.max_wait_s - self._clock()
            is_full = self._queue.rows_of(head.kind) >= self.limits.max_batch_rows
            if is_full or left_s <= 0:
                return
            self._arrived.clear()
            try:
                async with asyncio.timeout(left_s):  # wait_for may swallow our end (Python < 3.12)
                    await self._arrived.wait()
            except TimeoutError:
                self._arrived.set()

    def _fail_all(self, batch: Iterable[Work], error: Exception) -> None:
        for work in batch:
            work.fail(error)

    async def _answer(self, batch: list[Work]) -> None:
        started_s = self._clock()
        requests = [work.rows for work in batch]
        num_rows = sum(rows.num_rows for rows in requests)
        is_ready = self.is_ready(requests[0].layer, experts_of(requests))
        if not batch[0].alone:  # a health check says nothing about load
            self.stats.begin(started_s, num_rows)
        try:
            outputs, compute_s = await self._computed(batch, requests, is_ready)
        except Exception as error:
            self.stats.end()
            self._fail_all(batch, self._failed(error))
            return
        except asyncio.CancelledError:  # closing: nobody will wait for these outputs
            self._fail_all(batch, Draining("the replica has stopped"))
            raise
        finally:
            self._queue.busy_until_s = 0.0
        if not batch[0].alone:
            self._observe_wall(batch, requests)
            waited_row_s = sum(work.num_rows * (started_s - work.arrived_s) for work in batch)
            queue_s = started_s - min(work.arrived_s for work in batch)
            num_experts = len(experts_of(requests))
            self._account(num_rows, num_experts, queue_s, compute_s, is_ready, waited_row_s)
        for work, rows_RD in zip(batch, outputs, strict=True):
            if not work.answer.done():
                queue_s = started_s - work.arrived_s
                work.answer.set_result(Computed(rows_RD, queue_s, compute_s, num_rows))

    async def _computed(
        self, batch: list[Work], requests: list[PackedRows], is_ready: bool
    ) -> tuple[list[torch.Tensor], float]:
        # a short queue is emptied on the spot: through the thread it would never get empty
        is_short = self._is_short(sum(rows.num_rows for rows in requests)) and not batch[0].alone
        if is_short and is_ready:
            return self._timed(requests)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._timed, requests)

    def _observe_wall(self, batch: list[Work], requests: list[PackedRows]) -> None:
        """From the moment the device was free and rows were there."""
        began_s = max(self._free_s, min(work.arrived_s for work in batch))
        self._free_s = self._clock()
        num_rows = sum(rows.num_rows for rows in requests)
        fitted_s = self.stats.fitted_s(1, len(experts_of(requests)), num_rows)
        self.stats.observe_wall(fitted_s, self._free_s - began_s)

    def _timed(self, requests: list[PackedRows]) -> tuple[list[torch.Tensor], float]:
        started_s = self._clock()
        outputs = self._outputs(requests)
        return outputs, self._clock() - started_s

    def _outputs(self, requests: list[PackedRows]) -> list[torch.Tensor]:
        if len(requests) == 1 or not self._merge:
            return [self._compute(rows) for rows in requests]
        batch = merge(requests)
        return split(batch, self._compute(batch.rows), len(requests))
