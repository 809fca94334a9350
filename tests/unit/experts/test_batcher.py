"""The queue in front of a device, with a compute function that waits until the test lets it go."""

import asyncio

import pytest
import torch
from tests.unit.experts.gated_batcher import rows_of, running
from tests.waiting import until

from expertmesh.experts.batch import PackedRows
from expertmesh.experts.limits import BatchLimits
from expertmesh.runtime.errors import DeadlineExceeded, Draining, InternalError, QueueFull


def doubled(rows: PackedRows) -> torch.Tensor:
    """What the device answers for these rows."""
    return rows.rows_RD * 2


async def test_a_lone_request_is_computed_as_it_came() -> None:
    async with running() as mesh:
        rows = rows_of({2: 3})
        task = await mesh.queue(rows)
        mesh.device.open()
        done = await task
    assert mesh.device.batches[0].rows_RD is rows.rows_RD
    assert torch.equal(done.rows_RD, doubled(rows))
    assert done.batch_rows == 3


async def test_rows_of_one_layer_merge_while_the_device_is_busy() -> None:
    async with running() as mesh:
        busy = await mesh.occupy()
        ours, theirs = rows_of({1: 2, 2: 1}, first=10), rows_of({0: 1, 2: 2}, first=20)
        other = rows_of({1: 1}, layer=1, first=30)
        tasks = [await mesh.queue(rows) for rows in (ours, other, theirs)]
        mesh.device.open_for_good()
        answers = [await task for task in tasks]
        await busy
    assert mesh.device.layers == [9, 0, 1]
    merged = mesh.device.batches[1]
    assert (merged.experts, merged.rows_per_expert) == ((0, 1, 2), (1, 2, 3))
    for rows, answer in zip((ours, other, theirs), answers, strict=True):
        assert torch.equal(answer.rows_RD, doubled(rows))
    assert [answer.batch_rows for answer in answers] == [6, 1, 6]


async def test_layers_take_turns_by_their_oldest_request() -> None:
    async with running() as mesh:
        tasks = [await mesh.occupy()]
        for layer in (2, 1, 2, 3, 1):
            tasks.append(await mesh.queue(rows_of({0: 1}, layer=layer)))
        mesh.device.open_for_good()
        await asyncio.gather(*tasks)
    assert mesh.device.layers == [9, 2, 1, 3]
    assert mesh.device.sizes == [1, 2, 2, 1]


async def test_unmerged_requests_are_computed_one_by_one() -> None:
    async with running(merge=False) as mesh:
        await mesh.occupy()
        requests = [rows_of({0: 2}, first=10), rows_of({0: 1}, first=20)]
        tasks = [await mesh.queue(rows) for rows in requests]
        mesh.device.open_for_good()
        answers = [await task for task in tasks]
    assert [b.rows_RD is r.rows_RD for b, r in zip(mesh.device.batches[1:], requests, strict=True)]
    assert mesh.device.sizes == [1, 2, 1]
    for rows, answer in zip(requests, answers, strict=True):
        assert torch.equal(answer.rows_RD, doubled(rows))


async def test_a_batch_stays_within_the_row_budget() -> None:
    async with running(max_batch_rows=4) as mesh:
        await mesh.occupy()
        tasks = [await mesh.queue(rows_of({0: size})) for size in (3, 2, 1, 2)]
        mesh.device.open_for_good()
        await asyncio.gather(*tasks)
    assert mesh.device.sizes == [1, 4, 4], "3 + 1, then 2 + 2: a smaller one may fill the batch"


async def test_a_request_above_the_row_budget_goes_alone() -> None:
    async with running(max_batch_rows=4) as mesh:
        await mesh.occupy()
        tasks = [await mesh.queue(rows_of({0: size})) for size in (5, 1)]
        mesh.device.open_for_good()
        await asyncio.gather(*tasks)
    assert mesh.device.sizes == [1, 5, 1]


async def test_a_batch_that_is_not_full_waits_for_more() -> None:
    async with running(max_wait_s=1000.0, max_batch_rows=4) as mesh:
        mesh.device.open_for_good()
        first = await mesh.queue(rows_of({0: 3}))
        assert not mesh.device.batches
        second = await mesh.batcher.submit(rows_of({0: 1}))  # fills it; the clock stands still
        assert (await first).batch_rows == second.batch_rows == 4


async def test_rows_of_another_layer_do_not_fill_a_batch() -> None:
    async with running(max_wait_s=1000.0, max_batch_rows=4) as mesh:
        mesh.device.open_for_good()
        first = await mesh.queue(rows_of({0: 3}))
        others = [await mesh.queue(rows_of({0: 3}, layer=1))]
        assert not mesh.device.batches
        mesh.clock.advance(1000.0)
        others.append(
            asyncio.create_task(mesh.batcher.submit(rows_of({0: 1}, layer=2)))
        )  # wakes it
        assert (await first).batch_rows == 3
    await asyncio.gather(*others, return_exceptions=True)


async def test_nobody_waits_longer_than_max_wait() -> None:
    async with running(max_wait_s=0.02, max_batch_rows=4) as mesh:
        mesh.device.open_for_good()
        tasks = [await mesh.queue(rows_of({0: 1}, layer=layer)) for layer in (0, 1)]
        mesh.clock.advance(0.02)
        answers = [await task for task in tasks]
    assert [answer.queue_s for answer in answers] == pytest.approx([0.02, 0.02])


async def test_a_full_queue_refuses_with_numbers_and_takes_what_fits() -> None:
    async with running(max_queue_rows=4) as mesh:
        busy = await mesh.occupy()
        waiting = await mesh.queue(rows_of({0: 2}))
        with pytest.raises(QueueFull) as caught:
            await mesh.batcher.submit(rows_of({0: 2}))
        assert caught.value.message.startswith("2 rows do not fit the queue: 3 of 4 are waiting; ")
        assert caught.value.fields == {"queued_rows": "3", "max_queue_rows": "4", "rows": "2"}
        assert mesh.batcher.stats.queued_rows == 3
        fitting = await mesh.queue(rows_of({0: 1}))
        mesh.device.open_for_good()
        await asyncio.gather(busy, waiting, fitting)
        assert mesh.batcher.stats.queued_rows == 0
        await mesh.batcher.submit(rows_of({0: 4}))


async def test_limits_change_while_running() -> None:
    async with running(max_queue_rows=1) as mesh:
        await mesh.occupy()
        with pytest.raises(QueueFull):
            await mesh.batcher.submit(rows_of({0: 1}))
        mesh.batcher.limits = BatchLimits(max_queue_rows=3, max_batch_rows=1)
        tasks = [await mesh.queue(rows_of({0: 1})) for _ in range(2)]
        mesh.device.open_for_good()
        await asyncio.gather(*tasks)
    assert mesh.device.sizes == [1, 1, 1]


async def test_rows_whose_deadline_passed_in_the_queue_are_not_computed() -> None:
    async with running() as mesh:
        await mesh.occupy()
        late = await mesh.queue(rows_of({0: 1}), timeout_s=5.0)
        early = await mesh.queue(rows_of({0: 2}), timeout_s=60.0)
        patient = await mesh.queue(rows_of({0: 3}))
        mesh.clock.advance(5.05)
        mesh.device.open_for_good()
        with pytest.raises(DeadlineExceeded, match="while the rows were queued"):
            await late
        await asyncio.gather(early, patient)
    assert mesh.device.sizes == [1, 5]


async def test_rows_of_a_caller_that_has_gone_are_not_computed() -> None:
    async with running() as mesh:
        await mesh.occupy()
        gone, stays = await mesh.queue(rows_of({0: 4})), await mesh.queue(rows_of({0: 1}))
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert mesh.batcher.stats.queued_rows == 2
        mesh.device.open_for_good()
        await stays
    assert mesh.device.sizes == [1, 1]


async def test_a_queue_of_nobody_leaves_the_batcher_working() -> None:
    async with running() as mesh:
        busy = await mesh.occupy()
        gone = await mesh.queue(rows_of({0: 4}))
        gone.cancel()
        mesh.device.open_for_good()
        await busy
        assert (await mesh.batcher.submit(rows_of({0: 2}))).batch_rows == 2
    assert mesh.device.sizes == [1, 2]


async def test_a_caller_that_leaves_during_compute_costs_the_others_nothing() -> None:
    async with running() as mesh:
        busy = await mesh.occupy()
        ours, theirs = await mesh.queue(rows_of({0: 1})), await mesh.queue(rows_of({1: 1}, first=7))
        mesh.device.open()
        await busy
        await until(lambda: len(mesh.device.batches) == 2)
        ours.cancel()
        mesh.device.open_for_good()
        assert torch.equal((await theirs).rows_RD, torch.tensor([[14.0]]))


async def test_a_failing_batch_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as mesh:
        await mesh.occupy()
        mesh.device.broken_layer = 0
        first, second = await mesh.queue(rows_of({0: 1})), await mesh.queue(rows_of({1: 1}))
        other = await mesh.queue(rows_of({0: 1}, layer=1, first=3))
        mesh.device.open_for_good()
        for task in (first, second):
            with pytest.raises(InternalError, match="see the replica's log") as caught:
                await task
            assert "secret" not in caught.value.message
        assert torch.equal((await other).rows_RD, torch.tensor([[6.0]]))
        assert mesh.batcher.stats.queued_rows == 0
        assert mesh.batcher.stats.done_rows == 2, "failed rows are not done"
    assert "secret weights" in caplog.text


async def test_draining_finishes_what_is_queued_and_refuses_the_rest() -> None:
    async with running() as mesh:
        busy = await mesh.occupy()
        waiting = await mesh.queue(rows_of({0: 2}))
        draining = asyncio.create_task(mesh.batcher.drain())
        await asyncio.sleep(0)  # it has begun
        with pytest.raises(Draining, match="send the rows to another one"):
            await mesh.batcher.submit(rows_of({0: 1}))
        assert not draining.done()
        mesh.device.open_for_good()
        await draining
        assert [task.done() for task in (busy, waiting)] == [True, True]
        assert mesh.batcher.stats.queued_rows == 0


async def test_an_idle_batcher_drains_at_once() -> None:
    async with running() as mesh:
        await mesh.batcher.drain()


async def test_closing_fails_what_is_queued_and_what_is_computed() -> None:
    async with running() as mesh:
        busy, waiting = await mesh.occupy(), await mesh.queue(rows_of({0: 2}))
    for task in (busy, waiting):
        with pytest.raises(Draining, match="has stopped"):
            async with asyncio.timeout(10):
                await task
    with pytest.raises(Draining):
        await mesh.batcher.submit(rows_of({0: 1}))


async def test_closing_while_a_batch_waits_for_more() -> None:
    async with running(max_wait_s=1000.0) as mesh:
        waiting = await mesh.queue(rows_of({0: 2}))
    with pytest.raises(Draining, match="has stopped"):
        await waiting


async def test_times_are_those_of_the_clock() -> None:
    async with running() as mesh:
        mesh.device.before_answer = lambda: mesh.clock.advance(0.5)
        busy = await mesh.occupy()
        mesh.clock.advance(1.0)
        waiting = await mesh.queue(rows_of({0: 4}))
        mesh.device.open_for_good()
        first, second = await busy, await waiting
    assert (first.queue_s, first.compute_s) == (0.0, 1.5)
    assert (second.queue_s, second.compute_s) == (0.5, 0.5)
    assert mesh.told == [(1, 1.5), (4, 0.5)]


async def test_load_is_a_weighted_mean_over_batches() -> None:
    async with running() as mesh:
        mesh.device.before_answer = lambda: mesh.clock.advance(0.001)
        busy = await mesh.occupy()
        waiting = await mesh.queue(rows_of({0: 4}))
        mesh.device.open_for_good()
        await asyncio.gather(busy, waiting)
        stats = mesh.batcher.stats
        assert stats.row_time_us == pytest.approx(0.9 * 1000 + 0.1 * 1000 / 4)
        assert stats.queue_time_us == pytest.approx(0.9 * 0 + 0.1 * 1000)
        assert stats.done_rows == 5
