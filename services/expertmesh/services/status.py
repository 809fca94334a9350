"""Reads ControlService and shows the mesh to people."""

from types import TracebackType
from typing import Self

import grpc
from rich import box
from rich.markup import escape
from rich.table import Table

from expertmesh.client.failures import error_of
from expertmesh.experts.assignment import format_ids
from expertmesh.experts.sizing import format_bytes
from expertmesh.runtime.channels import connect_blocking
from expertmesh.runtime.security.access import PLAIN, Access
from expertmesh.v1 import control_pb2, control_pb2_grpc

_TIMEOUT_S = 5.0
_BOX = box.SIMPLE_HEAD


class MeshView:
    """A connection to one router's or gateway's ControlService."""

    def __init__(self, target: str, access: Access = PLAIN) -> None:
        self._access = access
        self._channel = connect_blocking(target, access)
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def read(self) -> control_pb2.GetSnapshotResponse:
        """The snapshot now.

        Raises:
            Unavailable: nobody answers at the target.
        """
        try:
            return self._stub.GetSnapshot(
                control_pb2.GetSnapshotRequest(),
                timeout=_TIMEOUT_S,
                metadata=self._access.metadata(),
            )
        except grpc.RpcError as failure:
            raise error_of(failure) from None

    def usage(self) -> control_pb2.GetExpertUsageResponse:
        """Rows routed to each expert since the process started."""
        try:
            return self._stub.GetExpertUsage(
                control_pb2.GetExpertUsageRequest(),
                timeout=_TIMEOUT_S,
                metadata=self._access.metadata(),
            )
        except grpc.RpcError as failure:
            raise error_of(failure) from None

    def scaling(self) -> control_pb2.GetScalingResponse:
        """The newest decision on each group that is scaled."""
        try:
            return self._stub.GetScaling(
                control_pb2.GetScalingRequest(),
                timeout=_TIMEOUT_S,
                metadata=self._access.metadata(),
            )
        except grpc.RpcError as failure:
            raise error_of(failure) from None

    def set_replicas(self, group: str, replicas: int, for_s: float) -> None:
        """Have a group keep so many replicas for so long.

        Raises:
            InvalidInput: no such group is scaled, or a number outside of its bounds.
        """
        request = control_pb2.SetReplicasRequest(
            group=group, replicas=replicas, for_ms=min(int(for_s * 1e3), 2**32 - 1)
        )
        try:
            self._stub.SetReplicas(request, timeout=_TIMEOUT_S, metadata=self._access.metadata())
        except grpc.RpcError as failure:
            raise error_of(failure) from None

    def release_replicas(self, group: str) -> bool:
        """Take back what was set by hand; whether something was."""
        request = control_pb2.ReleaseReplicasRequest(group=group)
        try:
            metadata = self._access.metadata()
            reply = self._stub.ReleaseReplicas(request, timeout=_TIMEOUT_S, metadata=metadata)
            return bool(reply.was_set)
        except grpc.RpcError as failure:
            raise error_of(failure) from None


def table(snapshot: control_pb2.GetSnapshotResponse) -> Table:
    """One row per replica."""
    redis = "redis answers" if snapshot.redis_connected else "REDIS AWAY, routing goes on"
    title = (
        f"mesh {snapshot.mesh}: {len(snapshot.replicas)} replicas, {redis} "
        f"(heard {snapshot.redis_age_ms / 1e3:.1f} s ago)"
    )
    columns = ("group", "replica", "state", "experts", "weights", "device memory free")
    numbers = ("busy", "queued", "us/row", "done", "heard")
    shown = Table(*columns, *numbers, title=title, caption=_missing(snapshot), box=_BOX)
    for view in snapshot.replicas:
        shown.add_row(*map(escape, _row(view)))
    return shown


def _missing(snapshot: control_pb2.GetSnapshotResponse) -> str | None:
    """What no replica takes work for, layers with the same gaps together."""
    layers: dict[str, list[int]] = {}
    for own in snapshot.missing:
        layers.setdefault(format_ids(own.experts), []).append(own.layer)
    gaps = [f"experts {ids} of layers {format_ids(own)}" for ids, own in layers.items()]
    return f"MISSING, no live replica: {'; '.join(gaps)}" if gaps else None


def _row(view: control_pb2.ReplicaView) -> list[str]:
    """What fits a terminal of 100 columns; `--json` has the rest."""
    state, device = view.state, view.state.device
    name = control_pb2.ReplicaStatus.Name(state.status).removeprefix("REPLICA_STATUS_").lower()
    free = f"{format_bytes(device.free_bytes)} of {format_bytes(device.total_bytes)}"
    return [
        state.group,
        state.replica,
        f"aside: {view.set_aside}" if view.set_aside else name,
        _experts(state),
        _weights(state),
        f"{device.kind} {free}",
        f"{device.utilisation_frac:.0%}",
        str(state.load.queued_rows),
        f"{state.load.row_time_us:.0f}",
        str(state.load.done_rows),
        f"{view.age_ms / 1e3:.1f} s",
    ]


def _weights(state: control_pb2.ReplicaState) -> str:
    """Of all experts, and of those on the device if that is not all."""
    all_of_them = format_bytes(state.weight_bytes)
    if not state.HasField("residency"):
        return all_of_them
    return f"{format_bytes(state.residency.resident_bytes)} of {all_of_them}"


def _experts(state: control_pb2.ReplicaState) -> str:
    held = {format_ids(layer.experts) for layer in state.holds}
    return held.pop() if len(held) == 1 else f"{sum(len(la.experts) for la in state.holds)} in all"
