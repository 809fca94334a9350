"""The bounded queue in front of a replica's device: rows of one layer, across callers, one batch.

While a batch computes, arriving rows queue up; the next batch takes every queued row of the oldest
request's layer, up to a row budget. A batch that is not full may wait a little for more.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

import torch

from expertmesh.experts.batch import PackedRows, merge, split
from expertmesh.experts.limits import BatchLimits
from expertmesh.runtime.errors import DeadlineExceeded, Draining, InternalError, QueueFull

logger = logging.getLogger(__name__)

_EWMA_WEIGHT = 0.1


@dataclass
class LoadStats:
    """How busy the replica is, as its heartbeat and its replies tell it."""

    queued_rows: int = 0
    done_rows: int = 0
    row_time_us: float = 0.0
    queue_time_us: float = 0.0

    def observe(self, num_rows: int, queue_s: float, compute_s: float) -> None:
        """Account one computed batch."""
        weight = _EWMA_WEIGHT if self.done_rows else 1.0
        self.row_time_us += weight * (compute_s * 1e6 / num_rows - self.row_time_us)
        self.queue_time_us += weight * (queue_s * 1e6 - self.queue_time_us)
        self.done_rows += num_rows


class Computed(NamedTuple):
    """One request's answer."""

    rows_RD: torch.Tensor
    queue_s: float
    """From admission to the start of compute."""
    compute_s: float
    """Of the batch the request was computed in."""
    batch_rows: int


@dataclass
class _Work:
    rows: PackedRows
    arrived_s: float
    deadline_s: float | None
    alone: bool
    answer: asyncio.Future[Computed] = field(default_factory=asyncio.Future)


class MicroBatcher:
    """Runs `compute` on one thread, batch after batch.

    Args:
        compute: outputs [R, D] of packed rows; runs on the batcher's own thread.
        clock: seconds, monotonic.
        merge: whether rows of different requests may share a matrix product. If not, requests of a
            batch are computed one after the other, each as if it were alone.
        on_batch: told the rows and the compute time (s) of each batch.
    """

    def __init__(
        self,
        compute: Callable[[PackedRows], torch.Tensor],
        limits: BatchLimits,
        clock: Callable[[], float],
        *,
        merge: bool = True,
        on_batch: Callable[[int, float], None] = lambda num_rows, compute_s: None,
    ) -> None:
        self._compute = compute
        self._clock = clock
        self._merge = merge
        self._on_batch = on_batch
        self._queue: deque[_Work] = deque()
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        # OpenMP's number of threads belongs to the thread; asking torch for it makes torch set it
        self._thread = ThreadPoolExecutor(1, "expertmesh-compute", torch.get_num_threads)
        self._task: asyncio.Task[None] | None = None
        self._draining = False
        self.limits = limits
        self.stats = LoadStats()

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
        self._fail_all(self._queue, Draining("the replica has stopped"))
        self._queue.clear()
        self._thread.shutdown(wait=False)

    async def submit(
        self, rows: PackedRows, timeout_s: float | None = None, *, alone: bool = False
    ) -> Computed:
        """Queue the rows and wait for their outputs.

        Args:
            alone: never share a batch.

        Raises:
            QueueFull: `max_queue_rows` would be exceeded; nothing was queued.
            Draining: the replica takes no more work.
            DeadlineExceeded: `timeout_s` passed before the rows were computed.
        """
        self._admit(rows)
        if not alone and self.computes_at_once(rows.num_rows):
            return self._compute_now(rows)
        now_s = self._clock()
        work = _Work(rows, now_s, None if timeout_s is None else now_s + timeout_s, alone)
        self.stats.queued_rows += rows.num_rows
        self._idle.clear()
        self._queue.append(work)
        self._arrived.set()
        try:
            return await work.answer
        finally:
            self.stats.queued_rows -= rows.num_rows
            if not self.stats.queued_rows:
                self._idle.set()

    def computes_at_once(self, num_rows: int) -> bool:
        """Whether `submit` would compute that many rows before it returns to the event loop."""
        return (
            not self.stats.queued_rows
            and 0 < self.stats.row_time_us * num_rows <= self.limits.at_once_s * 1e6
            and not self.limits.max_wait_s
        )

    def _compute_now(self, rows: PackedRows) -> Computed:
        """On the event loop: for a few rows shorter than handing them to the thread and back."""
        try:
            [rows_RD], compute_s = self._timed([rows])
        except Exception as error:
            raise self._failed(error) from error
        self._account(rows.num_rows, 0.0, compute_s)
        return Computed(rows_RD, 0.0, compute_s, rows.num_rows)

    def _failed(self, error: Exception) -> InternalError:
        logger.error("a batch failed", exc_info=error)
        return InternalError("the batch failed; see the replica's log")

    def _account(self, num_rows: int, queue_s: float, compute_s: float) -> None:
        self.stats.observe(num_rows, queue_s, compute_s)
        self._on_batch(num_rows, compute_s)

    def _admit(self, rows: PackedRows) -> None:
        if self._draining:
            raise Draining("the replica is draining; send the rows to another one")
        queued, limit = self.stats.queued_rows, self.limits.max_queue_rows
        if queued + rows.num_rows > limit:
            raise QueueFull(
                f"{rows.num_rows} rows do not fit the queue: {queued} of {limit} are waiting; "
                "retry later, send smaller batches or add replicas",
                queued_rows=queued,
                max_queue_rows=limit,
                rows=rows.num_rows,
            )

    async def drain(self) -> None:
        """Refuse new rows and wait until the admitted ones are answered."""
        self._draining = True
        await self._idle.wait()

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            await self._fill()
            batch = self._take()
            if not self._queue:
                self._arrived.clear()
            if batch:
                await self._answer(batch)

    async def _fill(self) -> None:
        """Wait for a fuller batch, but no longer than `max_wait_s` after the oldest arrived."""
        oldest = self._queue[0]
        while self._rows_of(oldest.rows.layer) < self.limits.max_batch_rows:
            left_s = oldest.arrived_s + self.limits.max_wait_s - self._clock()
            if left_s <= 0:
                return
            self._arrived.clear()
            try:
                async with asyncio.timeout(left_s):  # wait_for may swallow our end (Python < 3.12)
                    await self._arrived.wait()
            except TimeoutError:
                self._arrived.set()

    def _rows_of(self, layer: int) -> int:
        return sum(w.rows.num_rows for w in self._queue if w.rows.layer == layer)

    def _take(self) -> list[_Work]:
        """Remove and return the next batch: the oldest request and later ones of its layer."""
        batch: list[_Work] = []
        rest: deque[_Work] = deque()
        num_rows = 0
        now_s = self._clock()
        for work in self._queue:
            if work.answer.done():  # the caller has gone
                continue
            if work.deadline_s is not None and now_s > work.deadline_s:
                self._fail(work, DeadlineExceeded("the deadline passed while the rows were queued"))
            elif not batch or (
                work.rows.layer == batch[0].rows.layer
                and not (work.alone or batch[0].alone)
                and num_rows + work.rows.num_rows <= self.limits.max_batch_rows
            ):
                batch.append(work)
                num_rows += work.rows.num_rows
            else:
                rest.append(work)
        self._queue = rest
        return batch

    def _fail(self, work: _Work, error: Exception) -> None:
        if not work.answer.done():
            work.answer.set_exception(error)

    def _fail_all(self, batch: Iterable[_Work], error: Exception) -> None:
        for work in batch:
            self._fail(work, error)

    async def _answer(self, batch: list[_Work]) -> None:
        loop = asyncio.get_running_loop()
        started_s = self._clock()
        requests = [work.rows for work in batch]
        try:
            outputs, compute_s = await loop.run_in_executor(self._thread, self._timed, requests)
        except Exception as error:
            self._fail_all(batch, self._failed(error))
            return
        except asyncio.CancelledError:  # closing: nobody will wait for these outputs
            self._fail_all(batch, Draining("the replica has stopped"))
            raise
        num_rows = sum(rows.num_rows for rows in requests)
        if not batch[0].alone:  # a health check says nothing about load
            self._account(num_rows, started_s - batch[0].arrived_s, compute_s)
        for work, rows_RD in zip(batch, outputs, strict=True):
            if not work.answer.done():
                queue_s = started_s - work.arrived_s
                work.answer.set_result(Computed(rows_RD, queue_s, compute_s, num_rows))

    def _timed(self, requests: list[PackedRows]) -> tuple[list[torch.Tensor], float]:
        started_s = self._clock()
        outputs = self._outputs(requests)
        return outputs, self._clock() - started_s

    def _outputs(self, requests: list[PackedRows]) -> list[torch.Tensor]:
        if len(requests) == 1 or not self._merge:
            return [self._compute(rows) for rows in requests]
        batch = merge(requests)
        return split(batch, self._compute(batch.rows), len(requests))
