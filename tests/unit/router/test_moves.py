"""Moves that help, in steps that never take the last copy of an expert away."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.router.balance import balance, pour
from expertmesh.router.moves import Goal, Holdings, Step, best_move
from expertmesh.router.placement import Placement
from expertmesh.router.replan import improve


def holdings(placement: Placement, free: list[int], nodes: list[str] | None = None) -> Holdings:
    own = nodes or [f"n{place}" for place in range(len(free))]
    return Holdings({0: [list(h) for h in placement]}, free, {0: 10}, own)


def goal(loads: list[float], replicas: int, ratio: float = 1.0, **options: object) -> Goal:
    return Goal(loads, [1.0] * replicas, ratio * sum(loads) / replicas, **options)  # type: ignore[arg-type]


def test_the_hottest_gets_a_copy_where_there_is_room() -> None:
    move = best_move(0, goal([6.0, 1.0, 1.0], 2), holdings([[0], [1], [1]], [0, 10]))
    assert move
    assert move.steps == (Step("add", 0, 0, 1),)
    assert move.num_bytes == 10
    assert move.gain_frac == pytest.approx(2 / 8)


def test_without_room_a_copy_that_is_not_needed_goes_first() -> None:
    own = holdings([[0], [1], [0, 1]], [0, 0])
    move = best_move(0, goal([6.0, 1.0, 1.0], 2), own)
    assert move
    assert move.steps == (Step("drop", 0, 2, 1), Step("add", 0, 0, 1))


def test_nothing_moves_if_every_copy_is_needed() -> None:
    own = holdings([[0], [1], [0, 1]], [0, 0])
    assert best_move(0, goal([6.0, 1.0, 1.0], 2, min_copies=2), own) is None
    assert best_move(0, goal([6.0, 1.0], 2), holdings([[0], [1]], [0, 0])) is None


def test_nothing_moves_if_dispatch_can_balance() -> None:
    own = holdings([[0, 1], [1], [1]], [10, 10])
    assert best_move(0, goal([6.0, 1.0, 1.0], 2), own) is None


def test_on_paper_experts_change_places() -> None:
    loads = [4.0, 3.0, 1.0, 0.0]
    own = holdings([[0], [0], [1], [1]], [0, 0])
    moves = improve(own, {0: goal(loads, 2, is_live=False)}, float("inf"))
    assert moves
    assert balance(loads, [1.0] * 2, own.placement[0]).ratio == pytest.approx(1.0)
    assert [sum(place in h for h in own.placement[0]) for place in (0, 1)] == [2, 2]


def test_bytes_are_bounded_but_one_move_is_always_possible() -> None:
    loads = [8.0, 8.0, 8.0, *[0.1] * 5]
    placement = [[0], [0], [0], *[[1]] * 5]
    for most, count in ((1, 1), (25, 2), (1000, 2)):
        own = holdings(placement, [0, 1000])
        moves = improve(own, {0: goal(loads, 2)}, most)
        assert len(moves) == count or (most == 1000 and len(moves) >= 2)
        assert len(moves) == 1 or sum(move.num_bytes for move in moves) <= most


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[float], Placement, list[int]]:
    replicas = draw(st.integers(2, 4))
    loads = draw(st.lists(st.floats(0, 50), min_size=2, max_size=8))
    every = list(range(replicas))
    holders = st.lists(st.sampled_from(every), min_size=1, max_size=replicas, unique=True)
    free = draw(st.lists(st.integers(0, 30), min_size=replicas, max_size=replicas))
    return loads, [draw(holders) for _ in loads], free


@given(worlds(), st.integers(1, 2))
def test_after_every_step_every_expert_has_its_copies(
    world: tuple[list[float], Placement, list[int]], min_copies: int
) -> None:
    loads, placement, free = world
    own = holdings(placement, list(free))
    before = own.copy()
    target = goal(loads, len(free), 1.02, min_copies=min_copies)
    moves = improve(own, {0: target}, float("inf"))
    at_least = [min(min_copies, len(holders)) for holders in placement]
    overflow = pour(loads, target.speeds, before.placement[0], target.time).overflow
    for move in moves:
        for step in move.steps:
            before.apply([step])
            assert min(before.free_bytes) >= 0
            copies = [len(set(h)) for h in before.placement[0]]
            assert copies == [len(h) for h in before.placement[0]]
            assert all(a >= b for a, b in zip(copies, at_least, strict=True))
        now = pour(loads, target.speeds, before.placement[0], target.time).overflow
        assert now < overflow
        overflow = now
    assert before.placement == own.placement


def test_a_layer_far_off_gets_there_with_few_moves() -> None:
    """256 experts on 32 replicas, every hot one moved: a few per cent of the copies mend it."""
    random = Random(3)
    loads = [1 / rank for rank in range(1, 257)]
    random.shuffle(loads)
    placement: Placement = [[expert % 32] for expert in range(256)]
    for expert in random.sample(range(256), 32):
        placement[expert].append((expert + 1) % 32)
    own = holdings(placement, [0] * 32)
    assert balance(loads, [1.0] * 32, placement).ratio > 3
    moves = improve(own, {0: goal(loads, 32, 1.05)}, float("inf"))
    assert balance(loads, [1.0] * 32, own.placement[0]).ratio < 1.2
    assert len(moves) < 0.12 * 288
