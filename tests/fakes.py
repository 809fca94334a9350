"""Stand-ins for what a test cannot have: a device to order, and a clock that moves when told."""

from collections.abc import Iterable
from typing import Any

from expertmesh.runtime.device import DeviceReading
from expertmesh.v1 import control_pb2 as pb

GIB = 1 << 30


class FakeClock:
    """A monotonic clock that stands still until `advance` moves it."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, by_s: float) -> None:
        """Let `by_s` seconds pass."""
        assert by_s >= 0, "a monotonic clock"
        self.now_s += by_s


class FakeProbe:
    """A device whose next readings a test sets; the last one stays."""

    def __init__(self, *, total_bytes: int = 24 * GIB, free_bytes: int = 20 * GIB) -> None:
        self.reading = DeviceReading(
            kind="cuda",
            name="Fake",
            source="nvml",
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            used_bytes=total_bytes - free_bytes,
            utilisation_frac=0.0,
        )

    def read(self) -> DeviceReading:
        """The reading the test set last."""
        return self.reading

    def set(self, **changes: Any) -> None:
        """Replace fields of the reading."""
        self.reading = DeviceReading(**(vars(self.reading) | changes))


def replica_state(replica: str = "r0", **changes: Any) -> pb.ReplicaState:
    """A ReplicaState that routers accept, with `changes`."""
    fields: dict[str, Any] = {
        "group": "g0",
        "replica": replica,
        "address": "127.0.0.1:5000",
        "status": pb.REPLICA_STATUS_READY,
        "model": "demo",
        "hidden_size": 64,
        "holds": holds({0: [0, 3]}),
        "lease_ms": 1000,
        "sequence": 1,
        "incarnation": 1,
    }
    return pb.ReplicaState(**(fields | changes))


def holds(experts_by_layer: dict[int, Iterable[int]]) -> list[pb.LayerExperts]:
    """The `holds` field of a replica."""
    return [
        pb.LayerExperts(layer=layer, experts=sorted(experts))
        for layer, experts in experts_by_layer.items()
    ]
