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
from expertmesh.v1 import control_pb2, control_pb2_grpc

_TIMEOUT_S = 5.0
_BOX = box.SIMPLE_HEAD


class MeshView:
    """A connection to one router's or gateway's ControlService."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target)
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
            return self._stub.GetSnapshot(control_pb2.GetSnapshotRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as failure:
            raise error_of(failure) from None

    def usage(self) -> control_pb2.GetExpertUsageResponse:
        """Rows routed to each expert since the process started."""
        try:
            return self._stub.GetExpertUsage(
                control_pb2.GetExpertUsageRequest(), timeout=_TIMEOUT_S
            )
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
    shown = Table(*columns, "busy", "queued", "us/row", "done", "heard", title=title, box=_BOX)
    for view in snapshot.replicas:
        shown.add_row(*map(escape, _row(view)))
    return shown


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
        format_bytes(state.weight_bytes),
        f"{device.kind} {free}",
        f"{device.utilisation_frac:.0%}",
        str(state.load.queued_rows),
        f"{state.load.row_time_us:.0f}",
        str(state.load.done_rows),
        f"{view.age_ms / 1e3:.1f} s",
    ]


def _experts(state: control_pb2.ReplicaState) -> str:
    held = {format_ids(layer.experts) for layer in state.holds}
    return held.pop() if len(held) == 1 else f"{sum(len(la.experts) for la in state.holds)} in all"
