"""How a replica stands when a call is planned."""

from typing import Any

import pytest
from tests.fakes import holds, replica_state

from expertmesh.router.pools import Costs
from expertmesh.router.snapshot import UNKNOWN_ROW_US, Replica, Snapshot
from expertmesh.router.standing import FRESH_S, standing_of
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1.tensor_pb2 import DTYPE_BFLOAT16, DTYPE_FLOAT32

FITTED: dict[str, Any] = {
    "batch_time_us": 40.0,
    "expert_time_us": 20.0,
    "row_cost_us": 2.0,
    "row_time_us": 10.0,
}


def replica_with(own_rows: int = 0, state: dict[str, Any] | None = None, **load: Any) -> Replica:
    """As a router knows it after one heartbeat at second 5."""
    sent = replica_state("a", load=pb.ReplicaLoad(**load), **(state or {}))
    return Snapshot().with_state(sent, 5.0, own_rows).replicas["a"]


def test_costs_are_the_replicas_own() -> None:
    standing = standing_of(replica_with(**FITTED), 0, 0, transport_us=300.0, age_s=0.0)
    assert standing.costs == Costs(40.0, 20.0, 2.0, 0.0)
    assert (standing.ready_us, standing.resident, standing.is_fresh) == (300.0, None, True)


def test_without_a_fit_a_row_costs_its_mean_and_without_any_a_guess() -> None:
    assert standing_of(replica_with(row_time_us=7.0), 0, 0, 1.0, 0.0).costs == Costs(0, 0, 7.0)
    assert standing_of(replica_with(), 0, 0, 1.0, 0.0).costs == Costs(0, 0, UNKNOWN_ROW_US)


def test_rows_cost_something_in_any_case() -> None:
    standing = standing_of(replica_with(batch_time_us=40.0), 0, 0, 0.0, 0.0)
    assert standing.costs.row_us > 0


@pytest.mark.parametrize(
    ("age_s", "ready_us"), [(0.0, 1000.0), (0.0004, 600.0), (0.001, 0.0), (9.0, 0.0)]
)
def test_what_others_had_queued_is_worked_off_while_no_news_comes(
    age_s: float, ready_us: float
) -> None:
    replica = replica_with(queued_rows=130, own_rows=30, **FITTED)
    assert standing_of(replica, 0, 0, 0.0, age_s).ready_us == pytest.approx(ready_us)


def test_our_own_rows_are_known_whatever_the_age() -> None:
    replica = replica_with(queued_rows=30, own_rows=30, **FITTED)
    assert standing_of(replica, 0, 70, 0.0, 9.0).ready_us == 700.0


def test_news_gets_old() -> None:
    assert not standing_of(replica_with(), 0, 0, 0.0, 2 * FRESH_S).is_fresh


@pytest.mark.parametrize(
    ("state", "may_split"),
    [
        ({"dtype": DTYPE_BFLOAT16}, True),
        ({"dtype": DTYPE_FLOAT32}, False),
        ({"dtype": DTYPE_BFLOAT16, "deterministic": True}, False),
    ],
)
def test_experts_are_split_neither_in_float32_nor_in_deterministic_mode(
    state: dict[str, Any], may_split: bool
) -> None:
    assert standing_of(replica_with(state=state), 0, 0, 0.0, 0.0).may_split == may_split


def test_residency_is_the_layers_own() -> None:
    state = {
        "holds": holds({3: [0, 1, 2], 5: [4, 6]}),
        "residency": pb.Residency(load_time_us=500.0),
    }
    replica = replica_with(state=state, resident_bits=bytes([0b10110]), **FITTED)
    assert standing_of(replica, 3, 0, 0.0, 0.0).resident == frozenset({1, 2})
    assert standing_of(replica, 5, 0, 0.0, 0.0).resident == frozenset({6})
    assert standing_of(replica, 4, 0, 0.0, 0.0).resident == frozenset()
    assert standing_of(replica, 3, 0, 0.0, 0.0).costs.load_us == 500.0
