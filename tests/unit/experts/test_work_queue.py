"""Bounds in rows and bytes, admission by deadline, and batches that are ready in time."""

import asyncio

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes import FakeClock
from tests.unit.experts.gated_batcher import rows_of, running

from expertmesh.experts.cost_fit import BatchCost
from expertmesh.experts.limits import BatchLimits
from expertmesh.experts.load_stats import LoadStats
from expertmesh.experts.work import Work
from expertmesh.experts.work_queue import WorkQueue
from expertmesh.runtime.errors import CannotMakeIt, DeadlineExceeded, QueueFull
from expertmesh.runtime.origin import ANYONE, Origin, Priority

ROW_S = 0.001
BATCH = Priority.BATCH


class Queue:
    """A work queue whose replica needs a millisecond for a row, and its clock."""

    def __init__(self, *, knows_cost: bool = True, merge: bool = True, **limits: float) -> None:
        self.clock = FakeClock()
        self.stats = LoadStats()
        if knows_cost:
            self.stats.fit.cost = BatchCost(row_us=ROW_S * 1e6)
        self.queue = WorkQueue(BatchLimits(**limits), self.stats, self.clock, merge)  # type: ignore[arg-type]

    def add(
        self,
        rows: int,
        caller: str = "a",
        timeout_s: float | None = None,
        priority: Priority = Priority.INTERACTIVE,
        layer: int = 0,
        alone: bool = False,
    ) -> Work:
        origin = Origin(caller, priority)
        return self.queue.add(rows_of({0: rows}, layer=layer), origin, timeout_s, alone)

    def take(self) -> list[int]:
        """Rows of each work of the next batch."""
        return [work.num_rows for work in self.queue.take()]


def error_of(work: Work) -> BaseException | None:
    return work.answer.exception() if work.answer.done() else None


async def test_what_waits_counts_in_rows_and_in_bytes_until_it_is_answered() -> None:
    own = Queue()
    works = [own.add(2), own.add(3)]
    assert (own.stats.queued_rows, own.stats.queued_bytes) == (5, 20)
    assert own.take() == [2, 3]
    assert (own.stats.queued_rows, own.stats.queued_bytes) == (5, 20), "they are being computed"
    for work in works * 2:
        own.queue.take_out(work)
        own.queue.answered(work)
    assert (own.stats.queued_rows, own.stats.queued_bytes) == (0, 0)


async def test_bytes_are_bounded_like_rows() -> None:
    own = Queue(max_queue_bytes=20)
    own.add(3)
    with pytest.raises(QueueFull, match="12 bytes do not fit") as caught:
        own.add(3)
    assert caught.value.fields == {"queued_bytes": "12", "max_queue_bytes": "20", "bytes": "12"}
    assert caught.value.retry_after_s == pytest.approx(ROW_S)
    own.add(2)


async def test_a_modest_caller_finds_a_place_in_a_full_queue() -> None:
    own = Queue(max_queue_rows=6)
    greedy = [own.add(2) for _ in range(3)]
    own.add(1, "b")
    assert isinstance(error_of(greedy[2]), QueueFull), "the newest has lost its place"
    assert [error_of(work) for work in greedy[:2]] == [None, None]
    assert own.stats.queued_rows == 5
    with pytest.raises(QueueFull):
        own.add(2)
    assert own.take() == [2, 1, 2]


async def test_rows_that_are_computed_keep_their_place() -> None:
    own = Queue(max_queue_rows=4)
    own.add(4)
    own.take()
    with pytest.raises(QueueFull):
        own.add(1, "b")


async def test_who_would_be_late_is_refused_with_the_time_to_come_again() -> None:
    own = Queue()
    own.add(100)
    own.add(20, timeout_s=0.2)
    with pytest.raises(CannotMakeIt, match="layer 0: behind 120 rows, 5 rows take about 125") as no:
        own.add(5, timeout_s=0.005)
    assert no.value.retry_after_s == pytest.approx(0.12)
    assert no.value.fields["left_ms"] == "5.000"
    assert own.stats.queued_rows == 120


async def test_a_batch_that_is_computed_takes_its_time() -> None:
    own = Queue()
    own.add(100)
    own.take()
    with pytest.raises(CannotMakeIt):
        own.add(1, timeout_s=0.1)
    own.clock.advance(0.06)
    own.add(1, timeout_s=0.1)


async def test_an_idle_replica_tries() -> None:
    own = Queue()
    own.add(100, timeout_s=0.001)


async def test_what_is_not_known_refuses_nobody() -> None:
    own = Queue(knows_cost=False)
    own.add(100)
    own.add(100, timeout_s=0.001)


async def test_a_modest_caller_is_not_behind_a_greedy_one() -> None:
    own = Queue()
    for _ in range(100):
        own.add(10)
    with pytest.raises(CannotMakeIt):
        own.add(10, timeout_s=0.1)
    own.add(10, "b", timeout_s=0.1)
    with pytest.raises(CannotMakeIt):
        own.add(10, "c", timeout_s=0.1, priority=BATCH)


async def test_a_replica_that_has_become_slow_is_known_as_slow() -> None:
    own = Queue()
    for _ in range(60):
        own.stats.observe_wall(fitted_s=0.01, took_s=0.1)
    assert own.stats.drift == pytest.approx(10, rel=0.05)
    own.add(10)
    with pytest.raises(CannotMakeIt):
        own.add(1, timeout_s=0.1)
    for _ in range(60):
        own.stats.observe_wall(fitted_s=0.01, took_s=0.01)
    assert own.stats.drift == pytest.approx(1, rel=0.05)


def test_one_batch_says_little_and_a_short_one_less() -> None:
    stats = LoadStats()
    stats.observe_wall(fitted_s=0.01, took_s=1000.0)
    assert 1.1 < stats.drift < 1.3, "a process that was stopped for a while is not slow"
    stats.observe_wall(fitted_s=0.01, took_s=0.0)
    stats.observe_wall(fitted_s=0.0, took_s=1.0)
    assert 1.1 < stats.drift < 1.3
    short = LoadStats()
    short.observe_wall(fitted_s=1e-5, took_s=1e-3)
    assert 1.0 < short.drift < 1.01


async def test_a_batch_is_as_large_as_its_earliest_deadline_allows() -> None:
    own = Queue()
    for timeout_s in (None, 0.11, None, None):
        own.add(30, timeout_s=timeout_s)
    assert own.take() == [30, 30, 30]
    assert own.take() == [30]


async def test_who_cannot_be_ready_is_not_computed_but_an_estimate_is_no_proof() -> None:
    own = Queue()
    works = [own.add(1), own.add(50, timeout_s=0.1), own.add(60, timeout_s=1.0)]
    own.clock.advance(0.06)
    assert own.take() == [1, 60]
    assert isinstance(error_of(works[1]), CannotMakeIt)
    slow = Queue()
    first, second = slow.add(50, timeout_s=0.01), slow.add(1, "b", alone=True)
    assert slow.take() == [1]
    assert isinstance(error_of(first), CannotMakeIt)
    slow.queue.answered(second)
    slow.queue.answered(first)
    slow.add(50, timeout_s=0.01)
    assert slow.take() == [50]


async def test_deadlines_pass_in_the_queue() -> None:
    own = Queue()
    works = [own.add(1), own.add(1, timeout_s=1.0)]
    own.clock.advance(1.1)
    assert own.take() == [1]
    assert isinstance(error_of(works[1]), DeadlineExceeded)


async def test_the_gone_are_not_computed_even_before_they_have_left() -> None:
    own = Queue()
    gone = own.add(1)
    own.add(2)
    gone.answer.cancel()
    assert own.take() == [2]


async def test_health_checks_go_alone() -> None:
    own = Queue()
    for alone in (False, True, False):
        own.add(1, alone=alone)
    assert [own.take(), own.take()] == [[1, 1], [1]]


async def test_batch_rows_follow_interactive_ones_and_are_not_merged_with_them() -> None:
    own = Queue()
    own.add(1, priority=BATCH)
    own.add(2)
    assert [own.take(), own.take()] == [[2], [1]]


async def test_batch_rows_get_their_turn_within_ageing() -> None:
    own = Queue(ageing_s=2.0, max_batch_rows=1)
    own.add(1, "slow", priority=BATCH)
    for _ in range(10):
        own.add(1)
    turns = []
    for _ in range(5):
        turns.append(own.queue.take()[0].origin.caller)
        own.clock.advance(0.5)
    assert turns == ["a", "a", "a", "a", "slow"]


async def test_shares_hold_in_the_batcher_itself() -> None:
    async with running(max_batch_rows=4) as mesh:
        await mesh.occupy()
        tasks = [await mesh.queue(rows_of({0: 4}, first=10 * number)) for number in range(4)]
        modest = asyncio.create_task(
            mesh.batcher.submit(rows_of({0: 1}, first=99), origin=Origin("b"))
        )
        await asyncio.sleep(0)
        mesh.device.open_for_good()
        assert torch.equal((await modest).rows_RD, torch.tensor([[198.0]]))
        await asyncio.gather(*tasks)
    firsts = [float(batch.rows_RD[0]) for batch in mesh.device.batches[1:]]
    assert firsts.index(99.0) <= 1, "after one batch of the greedy one at most"


sizes = st.tuples(
    st.sampled_from("abc"), st.integers(1, 9), st.sampled_from(Priority), st.booleans()
)


@settings(deadline=None)
@given(st.lists(sizes, max_size=40), st.integers(1, 30), st.integers(4, 120))
async def test_bounds_hold_and_every_work_has_one_end(
    asked: list[tuple[str, int, Priority, bool]], max_rows: int, max_bytes: int
) -> None:
    own = Queue(max_queue_rows=max_rows, max_queue_bytes=max_bytes, max_batch_rows=7)
    admitted, computed = [], []
    for caller, rows, priority, takes in asked:
        try:
            admitted.append(own.add(rows, caller, priority=priority))
        except QueueFull:
            assert own.stats.queued_rows + rows > max_rows or (
                own.stats.queued_bytes + 4 * rows > max_bytes
            )
        assert own.stats.queued_rows <= max_rows
        assert own.stats.queued_bytes <= max_bytes
        if takes:
            batch = own.queue.take()
            computed += batch
            for work in batch:
                own.queue.answered(work)
    while own.queue:
        computed += own.queue.take()
    displaced = [work for work in admitted if error_of(work)]
    assert {id(work) for work in admitted} == {id(work) for work in displaced + computed}
    assert len(displaced) + len(computed) == len(admitted)


def test_anyone_is_interactive() -> None:
    assert Origin("", Priority.INTERACTIVE) == ANYONE
