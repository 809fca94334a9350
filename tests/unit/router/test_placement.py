"""Placements that live dispatch can balance, next to what no placement can beat."""

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.router.placement import Placement, lower_bound, plan_placement
from expertmesh.router.pools import Costs, Standing
from expertmesh.router.waterfill import share_out
from expertmesh.runtime.errors import InvalidInput


def longest(loads: list[int], speeds: list[float], placement: Placement) -> float:
    """Time of the slowest replica with live dispatch."""
    rows = {expert: load for expert, load in enumerate(loads) if load}
    holders = {expert: tuple(str(own) for own in placement[expert]) for expert in rows}
    shares = share_out(
        rows,
        holders,
        lambda name: Standing(Costs(row_us=1e3 / speeds[int(name)])),
        Random(0),
        message_us=0,
        split_gain_us=0,
    )
    level = [0.0] * len(speeds)
    for own in shares.values():
        for name, count in own:
            level[int(name)] += count / speeds[int(name)]
    return max(level)


LOADS = st.lists(st.integers(0, 1000), min_size=1, max_size=24)


@given(LOADS, st.lists(st.tuples(st.floats(0.1, 8), st.integers(0, 30)), min_size=1, max_size=8))
def test_every_expert_has_a_home_and_no_replica_too_many(
    loads: list[int], replicas: list[tuple[float, int]]
) -> None:
    speeds, slots = [own[0] for own in replicas], [own[1] for own in replicas]
    if sum(slots) < len(loads):
        with pytest.raises(InvalidInput, match="slots: expected room for"):
            plan_placement(loads, speeds, slots)
        return
    placement = plan_placement(loads, speeds, slots)
    assert all(placement)
    for own, room in enumerate(slots):
        assert sum(own in holders for holders in placement) <= room
    for holders in placement:
        assert len(set(holders)) == len(holders)


def test_shared_experts_form_a_chain() -> None:
    placement = plan_placement([8, 7, 6, 5, 4, 3, 2, 1], [1.0] * 4, [3] * 4)
    shared = [set(own) for own in placement if len(own) > 1]
    assert sum(len(own) - 1 for own in shared) == 4, "one link for each pair of neighbours"
    assert all(left & right for left, right in pairwise(shared))
    assert set().union(*shared) == {0, 1, 2, 3}


def test_zipf_is_balanced_to_the_bound() -> None:
    loads = [round(1e5 / rank) for rank in range(1, 257)]
    speeds = [1.0] * 32
    placement = plan_placement(loads, speeds, [9] * 32)
    assert longest(loads, speeds, placement) <= 1.03 * lower_bound(loads, speeds, 288)


def test_mixed_replicas_are_balanced_to_the_bound() -> None:
    loads = [round(1e5 / rank) for rank in range(1, 257)]
    speeds, slots = [2.0] * 8 + [1.0] * 8, [23] * 8 + [11] * 8
    placement = plan_placement(loads, speeds, slots)
    assert longest(loads, speeds, placement) <= 1.03 * lower_bound(loads, speeds, 272)


def test_the_bound_counts_the_copies_that_the_hottest_can_have() -> None:
    assert lower_bound([90, 5, 5], [1.0] * 4, 3) == 90, "one expert, one copy, one replica"
    assert lower_bound([90, 5, 5], [1.0] * 4, 4) == 45
    assert lower_bound([90, 5, 5], [1.0] * 4, 12) == 25
    assert lower_bound([90, 5, 5], [3.0, 1.0], 3) == 30, "on the fastest"
