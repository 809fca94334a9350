"""A record from Redis is checked field by field before anyone acts on it."""

import math
from typing import Any

import pytest
from tests.fakes import replica_state as record

from expertmesh.runtime.errors import MalformedMessage
from expertmesh.runtime.state import parse_record
from expertmesh.v1 import control_pb2 as pb


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("group", {"group": ""}),
        ("replica", {"replica": "a:b"}),
        ("address", {"address": "nowhere"}),
        ("address", {"address": "host:70000"}),
        ("status", {"status": pb.REPLICA_STATUS_UNSPECIFIED}),
        ("lease_ms", {"lease_ms": 1}),
        ("lease_ms", {"lease_ms": 1 << 31}),
        ("hidden_size", {"hidden_size": 0}),
        ("holds.layer", {"holds": [pb.LayerExperts(layer=1 << 20)]}),
        ("holds.experts", {"holds": [pb.LayerExperts(layer=0, experts=[1 << 30])]}),
        ("load.row_time_us", {"load": pb.ReplicaLoad(row_time_us=math.nan)}),
        ("load.queue_time_us", {"load": pb.ReplicaLoad(queue_time_us=-1)}),
        ("load.free_bytes", {"load": pb.ReplicaLoad(free_bytes=1 << 60)}),
        ("device.utilisation_frac", {"device": pb.DeviceState(utilisation_frac=1.5)}),
        ("device.total_bytes", {"device": pb.DeviceState(total_bytes=1 << 60)}),
        ("weight_bytes", {"weight_bytes": 1 << 60}),
    ],
)
def test_an_absurd_field_is_refused_by_name(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage, match=f"{field}: expected"):
        parse_record(record(**changes).SerializeToString())


def test_what_a_replica_writes_is_what_a_router_reads() -> None:
    state = record(address="[::1]:50051", lease_ms=0)
    assert parse_record(state.SerializeToString()) == state


def test_an_oversized_record_is_refused_unread() -> None:
    with pytest.raises(MalformedMessage, match="at most"):
        parse_record(b"\0" * (5 << 20))
