"""Heartbeats and surveys as the planner wants them."""

import pytest

from expertmesh.services.controller.world import (
    Seen,
    batch_time_us,
    num_experts,
    rows_so_far,
    speeds_of,
    window_rows,
    world_of,
)
from expertmesh.v1 import control_pb2, placement_pb2


def seen(
    name: str,
    experts: dict[int, int],
    guests: tuple[int, ...] = (),
    incarnation: int = 1,
    free: int = 0,
) -> Seen:
    """A replica that holds some of the four experts of layer 3, with the rows of each."""
    layer = placement_pb2.LayerSurvey(
        layer=3,
        num_experts=4,
        expert_bytes=10,
        experts=list(experts),
        rows=list(experts.values()),
        guests=guests,
    )
    state = control_pb2.ReplicaState(replica=name, host=f"host-{name}")
    survey = placement_pb2.SurveyResponse(
        incarnation=incarnation, layers=[layer], free_guest_bytes=free
    )
    return Seen(state, survey)


def test_who_holds_what() -> None:
    found = [seen("a", {0: 0, 1: 0}, free=7), seen("b", {1: 0, 2: 0}, guests=(1,))]
    world = world_of(found, [0.0, 0.0])
    assert world.names == ["a", "b"]
    assert world.holdings.placement == {3: [[0], [0, 1], [1], []]}
    assert world.missing == [(3, 3)]
    assert world.holdings.free_bytes == [7, 0]
    assert world.holdings.nodes == ["host-a", "host-b"]
    assert not world.holdings.may_drop(3, 1, 0, 1), "of its configuration"
    assert world.holdings.may_drop(3, 1, 1, 1), "a guest"
    assert not world.holdings.may_drop(3, 1, 1, 2)


def test_nobody_there() -> None:
    world = world_of([], [])
    assert (world.names, world.missing, world.speeds) == ([], [], [])


def test_rows_of_a_window() -> None:
    before = rows_so_far([seen("a", {0: 100, 1: 50}), seen("b", {1: 7})])
    now = [
        seen("a", {0: 130, 2: 5}),  # has given 1 up, and taken 2 on
        seen("b", {1: 3}, incarnation=2),  # started again
        seen("c", {1: 4}),
    ]
    rows = window_rows(before, rows_so_far(now), num_experts(now))
    assert rows == {3: [30.0, 7.0, 5.0, 0.0]}


def test_a_count_that_shrank_began_anew() -> None:
    before, now = rows_so_far([seen("a", {0: 100})]), rows_so_far([seen("a", {0: 30})])
    assert window_rows(before, now, {3: 4}) == {3: [30.0, 0.0, 0.0, 0.0]}


def test_replicas_about_as_fast_are_equally_fast() -> None:
    speeds = speeds_of([10.0, 13.0, 9.0, 31.0, 0.0])
    median = 11.5
    assert speeds == pytest.approx([1 / median] * 3 + [1 / 31.0, 1 / median])
    assert speeds_of([0.0]) == [1.0]


def test_replicas_are_compared_by_the_same_batch() -> None:
    load = control_pb2.ReplicaLoad(batch_time_us=10, expert_time_us=2, row_cost_us=0.5)
    assert batch_time_us(load) == 10 + 4 * 2 + 64 * 0.5
    assert batch_time_us(control_pb2.ReplicaLoad()) == 0
