"""Shares, priorities and places in the queue: nobody gets less than its share, nothing is lost."""

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.runtime.errors import InvalidInput
from expertmesh.runtime.fair_queue import FairQueue, Queued
from expertmesh.runtime.origin import Origin, Priority, priority_of

BATCH = Priority.BATCH


def work(
    caller: str, rows: int = 1, kind: int = 0, priority: Priority = Priority.INTERACTIVE
) -> Queued:
    """Work of so many rows, ten bytes each."""
    return Queued(Origin(caller, priority), kind, rows, 10 * rows)


def queue_of(items: Iterable[Queued], ageing_s: float = 1.0) -> FairQueue[Queued]:
    queue: FairQueue[Queued] = FairQueue(ageing_s)
    for item in items:
        queue.add(item, 0.0)
    return queue


def served(queue: FairQueue[Queued], max_rows: int = 1, now_s: float = 0.0) -> list[Queued]:
    """One turn: works until the rows are reached, at least one."""
    taken: list[Queued] = []
    rows = 0
    for item in queue.turn(now_s):
        if taken and rows + item.num_rows > max_rows:
            break
        queue.serve(item)
        taken.append(item)
        rows += item.num_rows
    return taken


def order(queue: FairQueue[Queued], max_rows: int = 1) -> str:
    """Callers as they are served, until nothing waits."""
    found = ""
    while queue:
        found += "".join(item.origin.caller for item in served(queue, max_rows))
    return found


def test_one_caller_is_served_in_order() -> None:
    items = [work("a", rows) for rows in (3, 1, 2)]
    queue = queue_of(items)
    assert [served(queue)[0] for _ in items] == items
    assert not queue
    assert queue.head(0.0) is None
    assert served(queue) == []


def test_callers_take_turns_whatever_they_have_queued() -> None:
    items = [work("a") for _ in range(6)] + [work("b"), work("b")]
    assert order(queue_of(items)) == "ababaaaa"


def test_shares_are_of_rows_not_of_calls() -> None:
    items = [work("a", 4) for _ in range(3)] + [work("b", 1) for _ in range(8)]
    assert order(queue_of(items)) == "abbbbabbbba"


def test_who_comes_late_is_not_paid_for_the_past() -> None:
    queue = queue_of(work("a") for _ in range(10))
    for _ in range(5):
        served(queue)
    for _ in range(3):
        queue.add(work("b"), 0.0)
    assert order(queue) == "bababaaa"


def test_a_busy_period_that_ends_is_forgotten() -> None:
    queue = queue_of([work("a", 100)])
    served(queue)
    for caller in "ab":
        queue.add(work(caller), 0.0)
    assert order(queue) == "ab"


def test_work_that_leaves_unserved_costs_its_caller_nothing() -> None:
    gone = [work("a", 50) for _ in range(3)]
    queue = queue_of([*gone, work("b", 2), work("a", 1), work("b", 2)])
    for item in gone:
        queue.remove(item)
        queue.remove(item)  # again: nothing
    assert (queue.num_rows, queue.num_bytes) == (5, 50)
    assert order(queue) == "bab"


def test_a_turn_is_of_one_kind_and_takes_turns_inside() -> None:
    items = [work("a", kind=1), work("a", kind=2), work("b", kind=2), work("a", kind=1), work("b")]
    queue = queue_of(items)
    assert (queue.kinds, queue.num_callers) == (3, 2)
    assert (queue.rows_of(1), queue.rows_of(2), queue.rows_of(5)) == (2, 1 + 1, 0)
    assert served(queue, 10) == [items[0], items[3]]
    assert served(queue, 10) == [items[2], items[1]]
    assert served(queue, 10) == [items[4]]


def test_interactive_work_goes_first_and_alone() -> None:
    queue = queue_of([work("a", priority=BATCH), work("b"), work("c")])
    assert [own.origin.caller for own in served(queue, 10)] == ["b", "c"]
    assert [own.origin.caller for own in served(queue, 10)] == ["a"]


def test_batch_work_gets_a_turn_each_time_it_has_waited_long() -> None:
    queue = queue_of([work("a", priority=BATCH) for _ in range(3)] + [work("b") for _ in range(20)])
    found = {}
    for tick in range(20):
        now_s = tick / 4
        found[now_s] = served(queue, now_s=now_s)[0].origin.caller
    assert [now_s for now_s, caller in found.items() if caller == "a"] == [1.0, 2.0, 3.0]


def test_waiting_counts_from_when_there_was_something_to_do() -> None:
    queue = queue_of([work("b")])
    queue.add(work("a", priority=BATCH), 100.0)
    assert served(queue, now_s=100.5)[0].origin.caller == "b"


def test_rows_before_are_those_of_a_fair_order() -> None:
    queue = queue_of([work("a", 100), work("a", 100), work("c", 3, priority=BATCH)])
    assert queue.rows_before(Origin("a"), 5) == 200
    assert queue.rows_before(Origin("b"), 5) == 5, "of the greedy one as many as of its own"
    assert queue.rows_before(Origin("c"), 500) == 200
    assert queue.rows_before(Origin("c", BATCH), 1) == 203
    assert queue.rows_before(Origin("d", BATCH), 1) == 201


def test_the_greedy_make_room() -> None:
    greedy = [work("a", 2) for _ in range(5)]
    queue = queue_of([*greedy, work("b", 1)])
    assert queue.displaced(Origin("b"), 3, 3, 0) == [greedy[4], greedy[3]]
    assert queue.displaced(Origin("b"), 3, 0, 15) == [greedy[4]]
    assert queue.displaced(Origin("b"), 3, 0, 0) == []
    assert queue.displaced(Origin("b"), 3, 7, 0) is None, "what is left must be more than b's"
    assert queue.displaced(Origin("a"), 1, 1, 0) is None, "nobody has more"
    assert len(queue.displaced(Origin("c", BATCH), 1, 1, 0) or []) == 0


def test_interactive_work_takes_the_places_of_batch_work() -> None:
    items = [work("a", priority=BATCH), work("b", 4, priority=BATCH), work("c")]
    queue = queue_of(items)
    assert queue.displaced(Origin("c"), 5, 5, 0) == [items[1], items[0]]
    assert queue.displaced(Origin("c"), 5, 6, 0) is None


def test_the_wire_says_who_goes_first() -> None:
    assert [priority_of(value) for value in (0, 1, 2)] == [
        Priority.INTERACTIVE,
        Priority.INTERACTIVE,
        Priority.BATCH,
    ]
    with pytest.raises(InvalidInput, match="priority: expected one of PRIORITY_UNSPECIFIED"):
        priority_of(3)


callers = st.sampled_from("abcd")
works = st.builds(work, callers, st.integers(1, 20), st.integers(0, 2), st.sampled_from(Priority))


@settings(deadline=None)
@given(st.lists(works, max_size=60), st.integers(1, 40), st.data())
def test_nothing_is_lost_or_served_twice(
    items: list[Queued], max_rows: int, data: st.DataObject
) -> None:
    queue: FairQueue[Queued] = FairQueue(1.0)
    gone, done, now_s = [], [], 0.0
    for item in items:
        queue.add(item, now_s)
        action = data.draw(st.sampled_from(["nothing", "serve", "remove"]))
        if action == "serve":
            turn = served(queue, max_rows, now_s)
            assert len({own.kind for own in turn}) <= 1
            assert len({own.origin.priority for own in turn}) <= 1
            done += turn
            now_s += 0.3
        elif action == "remove" and item.number:
            queue.remove(item)
            gone.append(item)
    assert queue.num_rows == sum(item.num_rows for item in items if item.number)
    assert queue.num_bytes == 10 * queue.num_rows
    while queue:
        done += served(queue, max_rows, now_s)
    assert Counter(map(id, done + gone)) == Counter(map(id, items))
    assert (queue.num_rows, queue.num_bytes, queue.kinds) == (0, 0, 0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(callers, st.integers(1, 20)), min_size=20, max_size=80),
    st.integers(1, 40),
)
def test_nobody_who_waits_gets_less_than_its_share(
    sizes: list[tuple[str, int]], max_rows: int
) -> None:
    """Goyal's bound: two callers that both wait differ by no more than what one of each's works
    and, as rows are served in batches, one batch can make."""
    queue = queue_of(work(caller, rows) for caller, rows in sizes)
    waiting = Counter({c: sum(r for own, r in sizes if own == c) for c in "abcd"})
    got: Counter[str] = Counter()
    largest = max(rows for _, rows in sizes)
    bound = 2 * largest
    while queue:
        for item in served(queue, max_rows):
            got[item.origin.caller] += item.num_rows
        still = [caller for caller in "abcd" if got[caller] < waiting[caller]]
        for one in still:
            for other in "abcd":
                assert got[other] - got[one] <= bound, (got, one, other)
