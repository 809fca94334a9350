"""Re-weight first, move last: when the controller proposes something, and what."""

from random import Random

import pytest

from expertmesh.router.balance import balance
from expertmesh.router.moves import Holdings
from expertmesh.router.placement import plan_placement
from expertmesh.router.popularity import Popularity
from expertmesh.router.replan import Proposal, ReplanLimits, Replanner
from expertmesh.runtime.config import validate
from expertmesh.runtime.errors import ConfigError

EXPERTS, REPLICAS = 16, 4
EVEN = [1e5] * EXPERTS
HOT = [2e6, *EVEN[1:]]
SPEEDS = [1.0] * REPLICAS


def world(free: int = 0, slots: int = 5, nodes: list[str] | None = None) -> Holdings:
    placement = {layer: plan_placement(EVEN, SPEEDS, [slots] * REPLICAS) for layer in (0, 1)}
    own = nodes or [f"n{place}" for place in range(REPLICAS)]
    return Holdings(placement, [free] * REPLICAS, {0: 10, 1: 10}, own)


class Windows:
    """A replanner over windows of rows."""

    def __init__(self, holdings: Holdings, **limits: float) -> None:
        self.limits = ReplanLimits.model_validate(limits)
        self.replanner = Replanner(self.limits)
        self.popularity = Popularity({0: EXPERTS, 1: EXPERTS}, self.limits.half_life_windows)
        self.holdings = holdings

    def see(self, *layers: list[float], speeds: list[float] = SPEEDS) -> Proposal:
        self.popularity.observe(dict(enumerate(layers)))
        return self.replanner.decide(self.popularity, speeds, self.holdings)


def test_without_rows_nothing_is_proposed() -> None:
    found = Windows(world()).see([0.0] * EXPERTS)
    assert (found.moves, found.reason) == ((), "no rows yet")


def test_what_dispatch_can_balance_is_left_alone() -> None:
    own, random = Windows(world()), Random(1)
    for _ in range(20):
        found = own.see(*([rows * random.gauss(1, 0.05) for rows in EVEN] for _ in range(2)))
        assert not found.moves
    assert found.reason.startswith("dispatch balances every layer: at most 1.0")


def test_moves_come_after_several_bad_windows() -> None:
    own = Windows(world(free=10), windows=3, half_life_windows=1)
    own.see(EVEN, EVEN)
    found = own.see(HOT, EVEN)
    while not found.layers[0].bad_windows:  # it could still be chance
        assert not found.moves
        found = own.see(HOT, EVEN)
    for bad in (1, 2):
        assert not found.moves
        assert found.layers[0].bad_windows == bad
        assert f"for {bad} of 3 windows: waiting" in found.reason
        found = own.see(HOT, EVEN)
    assert found.reason == "layers 0 stay uneven with dispatch solved anew"
    assert {step.layer for move in found.moves for step in move.steps} == {0}
    for move in found.moves:
        own.holdings.apply(move.steps)
    ratio = balance(own.popularity.known()[0], SPEEDS, own.holdings.placement[0]).ratio
    assert found.expected[0] == pytest.approx(ratio)
    assert 1 <= found.layers[0].bound <= ratio < found.layers[0].ratio
    assert own.see(HOT, EVEN).layers[0].bad_windows <= 1, "counted anew"


def test_a_single_bad_window_moves_nothing() -> None:
    own = Windows(world(free=10), windows=2, half_life_windows=0.1)
    for rows in (EVEN, HOT, EVEN, HOT, EVEN):
        assert not own.see(rows, EVEN).moves


def test_what_chance_explains_is_not_bad() -> None:
    """The same proportions, a few rows."""
    few = [rows / 1e5 for rows in HOT]
    own = Windows(world(free=10), windows=1)
    found = own.see(few, few)
    assert found.layers[0].ratio > 1.4
    assert found.layers[0].noise > 0.5
    assert not found.moves


def test_a_replica_that_has_become_slow_is_relieved() -> None:
    own = Windows(world(free=40), windows=1, goal=1.01)
    found = own.see(EVEN, EVEN, speeds=[0.2, 1.0, 1.0, 1.0])
    assert found.moves
    assert all(step.replica != 0 for move in found.moves for step in move.steps)


def test_bytes_of_a_replan_are_bounded() -> None:
    own = Windows(world(free=100), windows=1, max_step_bytes=25, goal=1.0)
    found = own.see(HOT, HOT)
    assert 0 < sum(move.num_bytes for move in found.moves) <= 25


def test_copies_on_too_few_nodes_are_put_right_first() -> None:
    holdings = world(free=200, slots=4, nodes=["a", "a", "b", "b"])
    own = Windows(holdings, windows=2, min_copies=2, max_step_bytes=40)
    own.see(HOT, EVEN)
    found = own.see(HOT, EVEN)
    assert "experts have copies on fewer than 2 nodes" in found.reason
    first = found.moves[0].steps[-1]
    assert (first.layer, first.expert) == (0, 0), "the most popular first"
    assert sum(move.num_bytes for move in found.moves) <= 40
    for _ in range(100):
        for move in found.moves:
            holdings.apply(move.steps)
        if min(holdings.num_nodes(layer, e) for layer in (0, 1) for e in range(EXPERTS)) == 2:
            return
        found = own.see(HOT, EVEN)
    pytest.fail("never two nodes each")


def test_min_copies_that_no_number_of_nodes_allows_are_not_waited_for() -> None:
    own = Windows(world(free=100, nodes=["a"] * REPLICAS), windows=1, min_copies=2)
    assert not own.see(EVEN, EVEN).moves


def test_nothing_that_helps_is_said() -> None:
    holdings = world(slots=4)
    found = Windows(holdings, windows=1).see(HOT, EVEN)
    assert not found.moves
    assert found.reason.endswith("but no move within the memory helps")


def test_limits_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"goal must be at most threshold, 1\.05"):
        validate(ReplanLimits, {"threshold": 1.05, "goal": 1.1})
