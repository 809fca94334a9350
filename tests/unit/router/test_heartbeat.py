"""Heartbeats with absurd fields: the replica gets no work, and it says why."""

from typing import Any

import pytest
from tests.fakes import holds, replica_state

from expertmesh.router.heartbeat import why_unusable
from expertmesh.v1 import control_pb2 as pb

NUM_EXPERTS = {0: 8, 2: 8}


def test_a_good_one_has_nothing_wrong() -> None:
    assert why_unusable(replica_state(holds=holds({0: [0, 7], 2: [3]})), NUM_EXPERTS) == ""


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"address": ""}, "address: expected host:port, got ''"),
        ({"address": "host"}, "address: expected host:port, got 'host'"),
        ({"address": "host:99999"}, "address: expected host:port, got 'host:99999'"),
        ({"address": ":50051"}, "address: expected host:port, got ':50051'"),
        ({"hidden_size": 0}, "hidden_size: expected the width of a row, got 0"),
        (
            {"load": pb.ReplicaLoad(row_time_us=float("nan"))},
            "load.row_time_us: expected a time in microseconds, got nan",
        ),
        (
            {"load": pb.ReplicaLoad(row_cost_us=-3)},
            "load.row_cost_us: expected a time in microseconds, got -3.0",
        ),
        (
            {"load": pb.ReplicaLoad(batch_time_us=float("inf"))},
            "load.batch_time_us: expected a time in microseconds, got inf",
        ),
        ({"holds": holds({1: [0]})}, "holds: expected MoE layers of the model, got layer 1"),
        ({"holds": holds({2: [7, 8]})}, "holds: expected experts 0 to 7 of layer 2, got expert 8"),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, Any], wrong: str) -> None:
    assert why_unusable(replica_state(**changes), NUM_EXPERTS) == wrong
