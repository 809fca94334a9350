"""From a google.rpc.Status back to the error it stands for; errors have `to_status`."""

from typing import TypeVar

from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from expertmesh.runtime.errors import (
    DOMAIN,
    CheckpointError,
    DeadlineExceeded,
    ExpertMeshError,
    InternalError,
    InvalidInput,
    MessageTooLarge,
    PermissionDenied,
    QueueFull,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)

M = TypeVar("M", bound=Message)
_MAX_RETRY_S = 86400.0


def _classes(base: type[ExpertMeshError]) -> dict[str, type[ExpertMeshError]]:
    found = {base.reason(): base}
    for child in base.__subclasses__():
        found |= _classes(child)
    return found


_BY_REASON = _classes(ExpertMeshError)
_BY_CODE: dict[int, type[ExpertMeshError]] = {
    code_pb2.INVALID_ARGUMENT: InvalidInput,
    code_pb2.NOT_FOUND: UnknownModel,
    code_pb2.UNAUTHENTICATED: Unauthenticated,
    code_pb2.PERMISSION_DENIED: PermissionDenied,
    code_pb2.RESOURCE_EXHAUSTED: QueueFull,
    code_pb2.FAILED_PRECONDITION: CheckpointError,
    code_pb2.DEADLINE_EXCEEDED: DeadlineExceeded,
    code_pb2.UNAVAILABLE: Unavailable,
    code_pb2.CANCELLED: Unavailable,  # what a stopping server answers to a call just arrived
}
_OVERSIZE = "message larger than max"  # gRPC's own refusal has the code of a full queue


def from_status(status: status_pb2.Status) -> ExpertMeshError:
    """The error a status stands for; a foreign status becomes the nearest class by its code."""
    return _error_of(status).after(_retry_after_s(status))


def _error_of(status: status_pb2.Status) -> ExpertMeshError:
    for detail in status.details:
        info = _unpacked(detail, error_details_pb2.ErrorInfo())
        if info.domain == DOMAIN and info.reason in _BY_REASON:
            return _BY_REASON[info.reason](status.message, **dict(info.metadata))
    if _OVERSIZE in status.message and status.code == code_pb2.RESOURCE_EXHAUSTED:
        return MessageTooLarge(status.message)
    return _BY_CODE.get(status.code, InternalError)(status.message)


def _retry_after_s(status: status_pb2.Status) -> float | None:
    for detail in status.details:
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = _unpacked(detail, error_details_pb2.RetryInfo()).retry_delay
            delay_s = float(delay.seconds) + float(delay.nanos) / 1e9
            return delay_s if 0 <= delay_s <= _MAX_RETRY_S else None  # a peer may send anything
    return None


def _unpacked(detail: any_pb2.Any, message: M) -> M:
    """The detail as such a message; an empty one if it is something else, or garbage."""
    try:
        detail.Unpack(message)
    except DecodeError:
        message.Clear()
    return message
