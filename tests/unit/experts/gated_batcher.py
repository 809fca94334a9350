"""A micro-batcher over a device that computes only when the test lets it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import torch
from tests.fakes import FakeClock
from tests.waiting import until

from expertmesh.experts.batch import Computed, PackedRows
from expertmesh.experts.batcher import MicroBatcher
from expertmesh.experts.limits import BatchLimits

GATE_TIMEOUT_S = 20.0


class Device:
    """Doubles rows. While `closed`, each batch waits for one `open()`."""

    def __init__(self) -> None:
        self.batches: list[PackedRows] = []
        self.closed = True
        self.broken_layer: int | None = None
        self.before_answer: Callable[[], None] = lambda: None
        self._gate = threading.Semaphore(0)

    def __call__(self, rows: PackedRows) -> torch.Tensor:
        self.batches.append(rows)
        if self.closed:
            assert self._gate.acquire(timeout=GATE_TIMEOUT_S)
        self.before_answer()
        if rows.layer == self.broken_layer:
            raise RuntimeError("secret weights")
        return rows.rows_RD * 2

    def open(self) -> None:
        """Let one batch pass."""
        self._gate.release()

    def open_for_good(self) -> None:
        """Let this and all later batches pass."""
        self.closed = False
        self._gate.release()

    @property
    def layers(self) -> list[int]:
        """Layer of each batch begun."""
        return [batch.layer for batch in self.batches]

    @property
    def sizes(self) -> list[int]:
        """Rows of each batch begun."""
        return [batch.num_rows for batch in self.batches]


def rows_of(counts: dict[int, int], *, layer: int = 0, first: float = 0.0) -> PackedRows:
    """Rows for these experts, valued `first`, `first` + 1, ..."""
    num_rows = sum(counts.values())
    rows_RD = torch.arange(num_rows, dtype=torch.float32).view(-1, 1) + first
    return PackedRows(
        layer, tuple(sorted(counts)), tuple(counts[e] for e in sorted(counts)), rows_RD
    )


class Harness:
    """A running batcher, its device and its clock."""

    def __init__(self, merge: bool, limits: dict[str, Any]) -> None:
        self.device = Device()
        self.clock = FakeClock()
        self.told: list[tuple[int, float]] = []
        self.batcher = MicroBatcher(
            self.device,
            BatchLimits(**limits),
            self.clock,
            merge=merge,
            on_batch=lambda num_rows, compute_s: self.told.append((num_rows, compute_s)),
        )

    async def occupy(self) -> "asyncio.Task[Computed]":
        """Submit one row of layer 9 and return once the device computes it."""
        task = asyncio.create_task(self.batcher.submit(rows_of({0: 1}, layer=9)))
        await until(lambda: bool(self.device.batches))
        return task

    async def queue(
        self, rows: PackedRows, timeout_s: float | None = None
    ) -> "asyncio.Task[Computed]":
        """Submit rows and return once they are queued."""
        queued_rows = self.batcher.stats.queued_rows
        task = asyncio.create_task(self.batcher.submit(rows, timeout_s))
        await until(lambda: self.batcher.stats.queued_rows == queued_rows + rows.num_rows)
        return task


@asynccontextmanager
async def running(*, merge: bool = True, **limits: Any) -> AsyncIterator[Harness]:
    """A batcher whose device is closed."""
    harness = Harness(merge, limits)
    try:
        async with harness.batcher:
            yield harness
    finally:
        harness.device.open_for_good()
