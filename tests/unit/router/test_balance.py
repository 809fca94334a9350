"""Dispatch solved anew: as fast as any can be, and no faster."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.router.balance import balance, pour
from expertmesh.router.placement import Placement


def by_duality(loads: list[float], speeds: list[float], placement: Placement) -> float:
    """The longest time of any set of experts on all replicas that hold some of them (max flow is
    min cut), by trying every set."""
    longest = 0.0
    for count in range(1, len(loads) + 1):
        for chosen in combinations(range(len(loads)), count):
            able = {own for expert in chosen for own in placement[expert]}
            work = sum(loads[expert] for expert in chosen)
            longest = max(longest, work / sum(speeds[own] for own in able))
    return longest


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[float], list[float], Placement]:
    speeds = draw(st.lists(st.floats(0.5, 8), min_size=1, max_size=5))
    loads = draw(st.lists(st.one_of(st.just(0.0), st.floats(0.1, 100)), min_size=1, max_size=7))
    every = list(range(len(speeds)))
    holders = st.lists(st.sampled_from(every), min_size=1, max_size=len(every), unique=True)
    return loads, speeds, [draw(holders) for _ in loads]


@given(worlds())
def test_it_is_the_best_there_is(world: tuple[list[float], list[float], Placement]) -> None:
    loads, speeds, placement = world
    found = balance(loads, speeds, placement)
    mean = sum(loads) / sum(speeds)
    assert found.mean == pytest.approx(mean)
    expected = max(mean, by_duality(loads, speeds, placement))
    assert found.time == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert sum(found.levels) == pytest.approx(sum(loads))
    for level, speed in zip(found.levels, speeds, strict=True):
        assert level <= found.time * speed * (1 + 1e-6) + 1e-9


def test_load_is_handed_on_along_a_chain() -> None:
    """Only the first replica has too much, only the last one too little."""
    placement = [[0], [0, 1], [1], [1, 2], [2]]
    found = balance([4.0, 2.0, 0.0, 4.0, 0.0], [1.0] * 3, placement)
    assert found.time == pytest.approx(4.0)
    assert found.ratio == pytest.approx(1.2)
    found = balance([3.0, 3.0, 0.0, 3.0, 0.0], [1.0] * 3, placement)
    assert found.levels == pytest.approx([3.0, 3.0, 3.0])


def test_what_overflows_and_who_is_full() -> None:
    placement = [[0, 1], [0], [2], [1, 2]]
    poured = pour([6.0, 1.0, 0.0, 0.0], [1.0] * 3, placement, 3.0)
    assert poured.overflow == pytest.approx(1.0)
    assert poured.tight == {0, 1}, "the third holds nothing that could be moved there"
    assert pour([6.0, 1.0, 0.0, 0.0], [1.0] * 3, placement, 3.5).overflow == pytest.approx(0)
    poured = pour([0.0, 5.0, 0.0, 1.0], [1.0] * 3, placement, 3.0)
    assert poured.overflow == pytest.approx(2.0), "of a single copy"
    assert poured.tight == {0}


def test_nothing_to_do_is_balanced() -> None:
    assert balance([0.0, 0.0], [1.0, 2.0], [[0], [1]]).ratio == 1.0
