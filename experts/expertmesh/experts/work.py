"""One request's rows as a replica has admitted them, and how they become a batch."""

import asyncio
from dataclasses import dataclass, field

from expertmesh.experts.batch import Computed, PackedRows
from expertmesh.experts.load_stats import LoadStats
from expertmesh.runtime.fair_queue import Queued

_MARGIN = 1.2
"""A batch grows as long as it is ready before every deadline even if it takes so much longer."""


@dataclass(eq=False)
class Work(Queued):
    """One request's rows."""

    rows: PackedRows
    arrived_s: float
    deadline_s: float | None
    alone: bool
    """Never share a batch."""
    is_counted: bool = True
    """Whether its rows and bytes are among those admitted and not yet answered."""
    answer: asyncio.Future[Computed] = field(default_factory=asyncio.Future)

    def fail(self, error: Exception) -> None:
        """Answer with an error, unless the caller has gone."""
        if not self.answer.done():
            self.answer.set_exception(error)


class Batch:
    """Works of one layer, as long as all are ready in time."""

    def __init__(self, now_s: float, stats: LoadStats, max_rows: int) -> None:
        self.works: list[Work] = []
        self.is_closed = False
        self.ready_s = now_s
        self._now_s = now_s
        self._stats = stats
        self._max_rows = max_rows
        self._num_rows = 0
        self._experts: set[int] = set()
        self._earliest_s = float("inf")

    @property
    def num_experts(self) -> int:
        """Different ones."""
        return len(self._experts)

    @property
    def is_full(self) -> bool:
        """Whether nothing more may join."""
        return self.is_closed or self._num_rows >= self._max_rows

    def could_be_ready(self, work: Work) -> bool:
        """Whether it would be in time if it were computed alone."""
        if work.deadline_s is None:
            return True
        took_s = self._stats.expected_s(1, len(work.rows.experts), work.rows.num_rows)
        return self._now_s + took_s <= work.deadline_s

    def takes(self, work: Work) -> bool:
        """Joins it if it fits."""
        if self.works:
            if self.is_closed or work.alone:
                return False
            num_rows = self._num_rows + work.num_rows
            if num_rows > self._max_rows or not self._in_time(work, num_rows):
                return False
        self.join(work)
        return True

    def _in_time(self, work: Work, num_rows: int) -> bool:
        earliest_s = self._earliest_s
        if work.deadline_s is not None:
            earliest_s = min(earliest_s, work.deadline_s)
        if earliest_s == float("inf"):
            return True
        experts = len(self._experts.union(work.rows.experts))
        took_s = _MARGIN * self._stats.expected_s(1, experts, num_rows)
        return self._now_s + took_s <= earliest_s

    def join(self, work: Work) -> None:
        """The batch with this work in it."""
        self.works.append(work)
        self.is_closed = work.alone
        self._num_rows += work.num_rows
        self._experts.update(work.rows.experts)
        if work.deadline_s is not None:
            self._earliest_s = min(self._earliest_s, work.deadline_s)
        took_s = self._stats.expected_s(1, len(self._experts), self._num_rows)
        self.ready_s = self._now_s + took_s
