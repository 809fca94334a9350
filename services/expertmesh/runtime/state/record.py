"""One replica's record in Redis: its key, and the check that a payload is a record we can act on.

    expertmesh:{mesh}:replica:{group}:{replica}   a serialised ReplicaState, expires with its lease
    expertmesh:{mesh}:replicas                    pub/sub channel of the same payloads

A record with `lease_ms` 0 is a tombstone: the replica is gone.
"""

import math
import re
from collections.abc import Iterator

from google.protobuf.message import DecodeError

from expertmesh.runtime.errors import ConfigError, MalformedMessage
from expertmesh.v1 import control_pb2 as pb

MAX_RECORD_BYTES = 1 << 20
MAX_LEASE_MS = 10 * 60 * 1000
_MIN_LEASE_MS = 100
_MAX_HIDDEN_SIZE = 1 << 20
_MAX_LAYERS = 1 << 12
_MAX_EXPERTS = 1 << 16
_MAX_BYTES = 1 << 50
_STATUSES = (pb.REPLICA_STATUS_READY, pb.REPLICA_STATUS_DRAINING)
_NAME = re.compile(r"[A-Za-z0-9_.#/-]{1,200}")
_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):(?P<port>[0-9]{1,5})")


def check_mesh_name(mesh: str) -> str:
    """`mesh` if it can be part of a Redis key and of a SCAN pattern; ConfigError otherwise."""
    if not _NAME.fullmatch(mesh):
        raise ConfigError.of("mesh", expected="1 to 200 of A-Z a-z 0-9 _ . # / -", got=repr(mesh))
    return mesh


def replica_key(mesh: str, group: str, replica: str) -> str:
    """The Redis key of one replica."""
    return f"expertmesh:{mesh}:replica:{group}:{replica}"


def replica_pattern(mesh: str) -> str:
    """The SCAN pattern of all replicas of a mesh."""
    return replica_key(mesh, "*", "*")


def channel_name(mesh: str) -> str:
    """The pub/sub channel of all replicas of a mesh."""
    return f"expertmesh:{mesh}:replicas"


def is_tombstone(state: pb.ReplicaState) -> bool:
    """Whether this record says that the replica is gone."""
    return state.lease_ms == 0


def parse_record(payload: bytes) -> pb.ReplicaState:
    """A record from Redis, checked: anyone who reaches Redis can write there.

    Raises:
        MalformedMessage: not a ReplicaState, or a field (named) no replica of ours would write.
    """
    if len(payload) > MAX_RECORD_BYTES:
        raise MalformedMessage(
            f"replica record: expected at most {MAX_RECORD_BYTES} bytes, got {len(payload)}"
        )
    try:
        state = pb.ReplicaState.FromString(payload)
    except DecodeError as error:
        raise MalformedMessage(
            f"replica record: expected a serialised ReplicaState, got {len(payload)} other bytes"
        ) from error
    check_record(state)
    return state


def check_record(state: pb.ReplicaState) -> None:
    """Raise MalformedMessage naming the first field that is missing or absurd."""
    for field, expected, got in _faults(state):
        raise MalformedMessage(
            f"replica record, {field}: expected {expected}, got {got!r}", field=field
        )


def _faults(state: pb.ReplicaState) -> Iterator[tuple[str, str, object]]:
    """(field, expected, got) of every wrong field."""
    for field, name in (("group", state.group), ("replica", state.replica)):
        if not _NAME.fullmatch(name):
            yield field, "1 to 200 of A-Z a-z 0-9 _ . # / -", name
    address = _ADDRESS.fullmatch(state.address)
    if not address or not 0 < int(address["port"]) < 1 << 16:
        yield "address", "host:port", state.address
    if state.status not in _STATUSES:
        yield "status", "READY or DRAINING", state.status
    if state.lease_ms and not _MIN_LEASE_MS <= state.lease_ms <= MAX_LEASE_MS:
        yield "lease_ms", f"0 or {_MIN_LEASE_MS} to {MAX_LEASE_MS}", state.lease_ms
    if not 0 < state.hidden_size <= _MAX_HIDDEN_SIZE:
        yield "hidden_size", f"1 to {_MAX_HIDDEN_SIZE}", state.hidden_size
    yield from _hold_faults(state)
    yield from _measure_faults(state)


def _hold_faults(state: pb.ReplicaState) -> Iterator[tuple[str, str, object]]:
    if len(state.holds) > _MAX_LAYERS:
        yield "holds", f"at most {_MAX_LAYERS} layers", len(state.holds)
        return
    for held in state.holds:
        if held.layer >= _MAX_LAYERS:
            yield "holds.layer", f"below {_MAX_LAYERS}", held.layer
        if held.experts and held.experts[-1] >= _MAX_EXPERTS:  # ascending; a max() costs 50 us
            yield "holds.experts", f"ids below {_MAX_EXPERTS}", held.experts[-1]


def _measure_faults(state: pb.ReplicaState) -> Iterator[tuple[str, str, object]]:
    load, device = state.load, state.device
    for field, time_us in (
        ("load.row_time_us", load.row_time_us),
        ("load.queue_time_us", load.queue_time_us),
    ):
        if not (math.isfinite(time_us) and time_us >= 0):
            yield field, "a finite time", time_us
    if not 0 <= device.utilisation_frac <= 1:
        yield "device.utilisation_frac", "0 to 1", device.utilisation_frac
    for field, size_bytes in (
        ("device.total_bytes", device.total_bytes),
        ("device.free_bytes", device.free_bytes),
        ("load.free_bytes", load.free_bytes),
        ("weight_bytes", state.weight_bytes),
    ):
        if size_bytes > _MAX_BYTES:
            yield field, f"at most {_MAX_BYTES}", size_bytes
