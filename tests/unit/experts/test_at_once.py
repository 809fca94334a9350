"""Rows that come to an idle replica and take no time are computed without a change of threads."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from tests.unit.experts.gated_batcher import rows_of

from expertmesh.experts.batch import PackedRows
from expertmesh.experts.batcher import MicroBatcher
from expertmesh.experts.limits import BatchLimits
from expertmesh.runtime.errors import InternalError, QueueFull, WeightsUnavailable

Compute = Callable[[PackedRows], torch.Tensor]
MILLISECOND_S = 1e-3


class Device:
    """Notes the thread each batch was computed in."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def __call__(self, rows: PackedRows) -> torch.Tensor:
        self.threads.append(threading.get_ident())
        if rows.layer == 3:
            raise RuntimeError("a device error")
        return rows.rows_RD * 2


def batcher_of(device: Device, **limits: float) -> MicroBatcher:
    """A batcher that has seen rows take a microsecond each."""
    batcher = MicroBatcher(device, BatchLimits(**limits), time.monotonic)  # type: ignore[arg-type]
    batcher.stats.observe(1, 0.0, 1e-6)
    return batcher


async def test_a_few_rows_are_computed_on_the_loop() -> None:
    device = Device()
    rows = rows_of({0: 2})
    async with batcher_of(device) as batcher:
        assert batcher.computes_at_once(rows.num_rows)
        done = await batcher.submit(rows)
        assert batcher.stats.done_rows == 3
    assert torch.equal(done.rows_RD, rows.rows_RD * 2)
    assert (done.queue_s, done.batch_rows) == (0.0, 2)
    assert device.threads == [threading.get_ident()]


async def test_many_rows_health_checks_and_first_rows_go_to_the_thread() -> None:
    device = Device()
    async with batcher_of(device, at_once_s=1e-6) as batcher:
        assert not batcher.computes_at_once(2)
        await batcher.submit(rows_of({0: 2}))
        await batcher.submit(rows_of({0: 1}), alone=True)
    async with MicroBatcher(device, BatchLimits(), time.monotonic) as fresh:
        assert not fresh.computes_at_once(1)
        await fresh.submit(rows_of({0: 1}))
    async with batcher_of(device, at_once_s=0) as never, batcher_of(device, max_wait_s=1) as waits:
        assert not never.computes_at_once(1)
        assert not waits.computes_at_once(1)
    assert threading.get_ident() not in device.threads
    assert len(device.threads) == 3


async def test_nothing_overtakes_the_queue() -> None:
    release = threading.Event()

    def slow(rows: PackedRows) -> torch.Tensor:
        release.wait(10)
        return rows.rows_RD

    batcher = MicroBatcher(slow, BatchLimits(), time.monotonic)
    async with batcher:
        first = asyncio.create_task(batcher.submit(rows_of({0: 1})))
        await asyncio.sleep(MILLISECOND_S)
        batcher.stats.observe(1, 0.0, 1e-6)
        assert not batcher.computes_at_once(1)
        release.set()
        await first


async def test_bounds_and_errors_are_the_same_as_through_the_queue() -> None:
    device = Device()
    async with batcher_of(device, max_queue_rows=3) as batcher:
        with pytest.raises(QueueFull):
            await batcher.submit(rows_of({0: 4}))
        with pytest.raises(InternalError, match="the batch failed"):
            await batcher.submit(rows_of({0: 1}, layer=3))
        await batcher.submit(rows_of({0: 1}))


async def test_what_must_wait_for_weights_goes_to_the_thread() -> None:
    device, ready = Device(), {0}

    def is_ready(layer: int, experts: Sequence[int]) -> bool:
        return ready.issuperset(experts)

    batcher = MicroBatcher(device, BatchLimits(), time.monotonic, is_ready=is_ready)
    batcher.stats.observe(1, 0.0, 1e-6)
    async with batcher:
        await batcher.submit(rows_of({0: 1}))
        await batcher.submit(rows_of({0: 1, 5: 1}))
        ready.add(5)
        await batcher.submit(rows_of({0: 1, 5: 1}))
    loop = threading.get_ident()
    assert [thread == loop for thread in device.threads] == [True, False, True]


async def test_errors_meant_for_callers_reach_them() -> None:
    def fails(rows: PackedRows) -> torch.Tensor:
        raise WeightsUnavailable("layer 0, expert 0: no memory")

    batcher = MicroBatcher(fails, BatchLimits(), time.monotonic)
    async with batcher:
        with pytest.raises(WeightsUnavailable, match="no memory"):
            await batcher.submit(rows_of({0: 1}))
        batcher.stats.observe(1, 0.0, 1e-6)
        with pytest.raises(WeightsUnavailable, match="no memory"):
            await batcher.submit(rows_of({0: 1}))
