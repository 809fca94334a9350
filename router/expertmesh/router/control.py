"""ControlService: what this router core sees and has routed, and the scaling of the groups."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from expertmesh.router.core import RouterCore
from expertmesh.router.snapshot import Key, Replica
from expertmesh.runtime.state.scaling import ScalingBoard
from expertmesh.v1 import control_pb2, control_pb2_grpc

SERVICE = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name
_NEVER_MS = 2**32 - 1


def by_layer(keys: Iterable[Key]) -> list[control_pb2.LayerExperts]:
    """(layer, expert) pairs, ascending, as messages."""
    found: dict[int, list[int]] = {}
    for layer, expert in keys:
        found.setdefault(layer, []).append(expert)
    return [control_pb2.LayerExperts(layer=own, experts=ids) for own, ids in found.items()]


class ControlServicer(control_pb2_grpc.ControlServiceServicer):
    """Reads a router core.

    Args:
        board: decisions on scaling, and orders.
        redis: (whether Redis answers now, seconds since it last did).
        clock: the core's clock.
    """

    def __init__(
        self,
        mesh: str,
        core: RouterCore,
        board: ScalingBoard,
        redis: Callable[[], tuple[bool, float]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mesh = mesh
        self._core = core
        self._board = board
        self._redis = redis
        self._clock = clock

    async def GetSnapshot(
        self, request: control_pb2.GetSnapshotRequest, context: Any
    ) -> control_pb2.GetSnapshotResponse:
        """The replicas as last seen."""
        snapshot, now_s = self._core.snapshot, self._clock()
        connected, age_s = self._redis()
        replicas = [self._view(r, now_s) for _, r in sorted(snapshot.replicas.items())]
        return control_pb2.GetSnapshotResponse(
            version=snapshot.version,
            mesh=self._mesh,
            replicas=replicas,
            redis_age_ms=min(int(min(age_s, 4e6) * 1e3), _NEVER_MS),
            redis_connected=connected,
            missing=by_layer(self._core.missing()),
        )

    def _view(self, replica: Replica, now_s: float) -> control_pb2.ReplicaView:
        view = control_pb2.ReplicaView(
            state=replica.state,
            age_ms=int((now_s - replica.heard_s) * 1e3),
            in_flight_rows=self._core.in_flight_rows(replica.life),
            set_aside=replica.set_aside,
        )
        view.state.load.CopyFrom(replica.load)
        return view

    async def GetExpertUsage(
        self, request: control_pb2.GetExpertUsageRequest, context: Any
    ) -> control_pb2.GetExpertUsageResponse:
        """Rows routed per layer and expert."""
        return self._core.usage.to_proto()

    async def GetScaling(
        self, request: control_pb2.GetScalingRequest, context: Any
    ) -> control_pb2.GetScalingResponse:
        """The newest decision on each group."""
        return control_pb2.GetScalingResponse(groups=await self._board.read())

    async def SetReplicas(
        self, request: control_pb2.SetReplicasRequest, context: Any
    ) -> control_pb2.SetReplicasResponse:
        """A number of replicas, set by hand for a time."""
        await self._board.set_replicas(request.group, request.replicas, request.for_ms)
        return control_pb2.SetReplicasResponse()

    async def ReleaseReplicas(
        self, request: control_pb2.ReleaseReplicasRequest, context: Any
    ) -> control_pb2.ReleaseReplicasResponse:
        """The rule decides again."""
        was_set = await self._board.release(request.group)
        return control_pb2.ReleaseReplicasResponse(was_set=was_set)
