"""What a replica has admitted: bounds in rows and bytes, admission by deadline, and the next batch.

Order and shares are `runtime.fair_queue`'s. Times are the caller's clock's.
"""

from collections import Counter
from collections.abc import Callable

from expertmesh.experts.batch import PackedRows
from expertmesh.experts.limits import BatchLimits
from expertmesh.experts.load_stats import LoadStats
from expertmesh.experts.work import Batch, Work
from expertmesh.runtime.errors import CannotMakeIt, DeadlineExceeded, ExpertMeshError, QueueFull
from expertmesh.runtime.fair_queue import FairQueue
from expertmesh.runtime.origin import Origin

_MARGIN = 1.25
"""Work is admitted if it would still be in time if everything took so much longer than expected.
Routers, who can refuse a call before any replica has worked for it, take a larger one."""
_LEAST_RETRY_S = 0.001
_UNKNOWN_RETRY_S = 0.05
_MOST_RETRY_S = 30.0
_MOST_MISFITS = 32
"""Works that are passed over for one batch because they do not fit, before it is full enough."""


class WorkQueue:
    """The works that wait and the bounds of all that are admitted.

    Args:
        stats: says what is admitted and what work takes.
        clock: seconds, monotonic.
        merge: whether works of a batch share an expert's product.
    """

    def __init__(
        self, limits: BatchLimits, stats: LoadStats, clock: Callable[[], float], merge: bool
    ) -> None:
        self._stats = stats
        self._clock = clock
        self._merge = merge
        self._fair: FairQueue[Work] = FairQueue(limits.ageing_s)
        self._experts_of: Counter[int] = Counter()
        """Experts of the works that wait, by layer."""
        self._most_experts = 1
        """In any batch so far."""
        self.busy_until_s = 0.0
        """When the batch that is computed should be ready."""
        self.limits = limits

    @property
    def limits(self) -> BatchLimits:
        """Changed while running."""
        return self._limits

    @limits.setter
    def limits(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._fair.ageing_s = limits.ageing_s

    def __bool__(self) -> bool:
        return bool(self._fair)

    @property
    def num_callers(self) -> int:
        """Who wait, and who have had more than their share."""
        return self._fair.num_callers

    def head(self) -> Work | None:
        """Whose turn it is."""
        return self._fair.head(self._clock())

    def oldest_wait_s(self) -> float:
        """How long the oldest work that is not being computed has waited; 0 if there is none."""
        oldest = self._fair.oldest()
        return self._clock() - oldest.arrived_s if oldest else 0.0

    def rows_of(self, layer: int) -> int:
        """Rows of a layer that wait."""
        return self._fair.rows_of(layer)

    # -- admission -------------------------------------------------------------------------------

    def check_room(self, num_rows: int, num_bytes: int) -> None:
        """For work that does not wait.

        Raises:
            QueueFull: it would exceed the bounds.
        """
        stats, limits = self._stats, self._limits
        if stats.queued_rows + num_rows > limits.max_queue_rows:
            raise self._full("rows", num_rows, stats.queued_rows, limits.max_queue_rows)
        if stats.queued_bytes + num_bytes > limits.max_queue_bytes:
            raise self._full("bytes", num_bytes, stats.queued_bytes, limits.max_queue_bytes)

    def add(self, rows: PackedRows, origin: Origin, timeout_s: float | None, alone: bool) -> Work:
        """Admit and queue. Others may lose their places to it, and get QueueFull.

        Raises:
            QueueFull: the bounds are reached.
            CannotMakeIt: others' work leaves too little of `timeout_s`.
        """
        now_s = self._clock()
        num_bytes = rows.rows_RD.nbytes
        deadline_s = None if timeout_s is None else now_s + timeout_s
        work = Work(origin, rows.layer, rows.num_rows, num_bytes, rows, now_s, deadline_s, alone)
        leaving = self._leaving(work)
        if timeout_s is not None and self._stats.queued_rows:
            self._check_deadline(work, timeout_s, now_s)
        for loser in leaving:
            self._displace(loser)
        self._fair.add(work, now_s)
        self._experts_of[rows.layer] += len(rows.experts)
        self._stats.queued_rows += work.num_rows
        self._stats.queued_bytes += num_bytes
        return work

    def _leaving(self, work: Work) -> list[Work]:
        """Works that must make room for this one."""
        stats, limits = self._stats, self._limits
        rows = stats.queued_rows + work.num_rows - limits.max_queue_rows
        num_bytes = stats.queued_bytes + work.num_bytes - limits.max_queue_bytes
        if rows <= 0 and num_bytes <= 0:
            return []
        leaving = self._fair.displaced(work.origin, work.num_rows, rows, num_bytes)
        if leaving is None:
            self.check_room(work.num_rows, work.num_bytes)
        return leaving or []

    def _displace(self, loser: Work) -> None:
        self.take_out(loser)
        limits = self._limits
        loser.fail(self._full("rows", loser.num_rows, limits.max_queue_rows, limits.max_queue_rows))
        self.answered(loser)

    def _full(self, unit: str, wanted: int, queued: int, limit: int) -> QueueFull:
        over = (queued + wanted - limit) / max(queued, 1)
        fields = {f"queued_{unit}": queued, f"max_queue_{unit}": limit, unit: wanted}
        return QueueFull(
            f"{wanted} {unit} do not fit the queue: {queued} of {limit} are waiting; "
            "retry later, send smaller batches or add replicas",
            **fields,
        ).after(self._retry_s(over * self._expected_s(self._fair.num_rows)))

    def _check_deadline(self, work: Work, timeout_s: float, now_s: float) -> None:
        rows = work.rows
        busy_s = max(0.0, self.busy_until_s - now_s)
        before = self._fair.rows_before(work.origin, rows.num_rows)
        waiting_s = busy_s + self._expected_s(before)
        waiting_s += self._limits.max_wait_s
        needed_s = waiting_s + self._stats.expected_s(1, len(rows.experts), rows.num_rows)
        if needed_s * _MARGIN > timeout_s:
            retry_s = min(needed_s * _MARGIN - timeout_s, waiting_s)
            raise self._too_late(rows, before, needed_s, timeout_s).after(self._retry_s(retry_s))

    def _too_late(
        self, rows: PackedRows, before: int, needed_s: float, timeout_s: float
    ) -> CannotMakeIt:
        return CannotMakeIt(
            f"layer {rows.layer}: behind {before} rows, {rows.num_rows} rows take about "
            f"{needed_s * 1e3:.1f} ms, and {timeout_s * 1e3:.1f} ms are left; "
            "ask another replica, retry later or give more time",
            layer=rows.layer,
            needed_ms=f"{needed_s * 1e3:.3f}",
            left_ms=f"{timeout_s * 1e3:.3f}",
        )

    def _retry_s(self, wanted_s: float) -> float:
        known = self._stats.fit.cost.row_us or self._stats.fit.cost.batch_us
        return min(max(wanted_s, _LEAST_RETRY_S), _MOST_RETRY_S) if known else _UNKNOWN_RETRY_S

    def _expected_s(self, num_rows: int) -> float:
        """How long so many of the waiting rows take: as much of everything as their share is."""
        share = num_rows / max(self._fair.num_rows, 1)
        batches = max(self._fair.kinds, self._fair.num_rows / self._limits.max_batch_rows)
        each = self._experts_of.values()
        if self._merge:
            experts = sum(min(count, self._most_experts) for count in each)
        else:
            experts = sum(each)
        return self._stats.expected_s(batches * share, experts * share, num_rows)

    # -- the way out -----------------------------------------------------------------------------

    def take_out(self, work: Work) -> None:
        """It waits no more; nothing happens if it did not."""
        if work.number:
            self._fair.remove(work)
            self._experts_gone(work)

    def answered(self, work: Work) -> None:
        """Nobody waits for it any more: its rows and bytes are free."""
        if work.is_counted:
            work.is_counted = False
            self._stats.queued_rows -= work.num_rows
            self._stats.queued_bytes -= work.num_bytes

    def _experts_gone(self, work: Work) -> None:
        layer = work.rows.layer
        self._experts_of[layer] -= len(work.rows.experts)
        if not self._experts_of[layer]:
            del self._experts_of[layer]

    def take(self) -> list[Work]:
        """The next batch, which is computed from now on; works that are too late are failed.

        A work joins if the batch is then still ready before every deadline in it. One that cannot
        be ready in time is not computed, but of works of which that is thought the first is: an
        estimate is no proof, and only computing makes it better.
        """
        now_s = self._clock()
        batch = Batch(now_s, self._stats, self._limits.max_batch_rows)
        doomed: list[Work] = []
        misfits = 0
        for work in self._fair.turn(now_s):
            if work.answer.done():  # its caller has gone
                self.take_out(work)
            elif work.deadline_s is not None and now_s > work.deadline_s:
                message = "the deadline passed while the rows were queued"
                self._fail(work, DeadlineExceeded(message))
            elif not batch.could_be_ready(work):
                doomed.append(work)
            elif batch.takes(work):
                self._serve(work)
            else:
                misfits += 1
            if batch.is_full or misfits == _MOST_MISFITS:
                break
        if doomed and not batch.works:
            batch.join(doomed[0])
            self._serve(doomed.pop(0))
        for work in doomed:
            self._fail(work, self._doomed(work, now_s))
        self._most_experts = max(self._most_experts, batch.num_experts)
        self.busy_until_s = batch.ready_s
        return batch.works

    def _serve(self, work: Work) -> None:
        self._fair.serve(work)
        self._experts_gone(work)

    def _fail(self, work: Work, error: Exception) -> None:
        self.take_out(work)
        work.fail(error)

    def _doomed(self, work: Work, now_s: float) -> ExpertMeshError:
        needed_s = self._stats.expected_s(1, len(work.rows.experts), work.rows.num_rows)
        left_s = (work.deadline_s or now_s) - now_s
        return self._too_late(work.rows, 0, needed_s, left_s).after(self._retry_s(needed_s))

    def fail_all(self, error: Exception) -> None:
        """Nothing waits any more."""
        while self._fair:
            for work in list(self._fair.turn(self._clock())):
                self._fail(work, error)
