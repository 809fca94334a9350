"""Every error expertmesh raises on purpose, with its gRPC status code and typed details.

ExpertMeshError
├── InvalidInput                INVALID_ARGUMENT     a field of a request or a setting is wrong
│   ├── ConfigError             INVALID_ARGUMENT     the configuration, before anything has started
│   ├── NonFiniteInput          INVALID_ARGUMENT     NaN or infinity where reject_nonfinite is on
│   └── MalformedMessage        INVALID_ARGUMENT     bytes that do not parse
├── CheckpointError             FAILED_PRECONDITION  the checkpoint directory cannot be served
│   ├── NotACheckpoint          FAILED_PRECONDITION  no config.json or no safetensors
│   ├── MissingShard            FAILED_PRECONDITION  the index names a file that is not there
│   ├── DamagedShard            FAILED_PRECONDITION  shorter than its header says, or no header
│   └── UnsupportedCheckpoint   FAILED_PRECONDITION  a model family or layout we do not read
├── InsufficientMemory          FAILED_PRECONDITION  the experts do not fit the device
├── UnknownModel                NOT_FOUND            no such model here
├── UnknownExpert               NOT_FOUND            no such layer or expert in the model
├── MessageTooLarge             RESOURCE_EXHAUSTED   above max_message_bytes
├── QueueFull                   RESOURCE_EXHAUSTED   a bounded queue is full; retry later
├── DeadlineExceeded            DEADLINE_EXCEEDED    no answer in the time the caller gave
├── Unavailable                 UNAVAILABLE          retrying, here or elsewhere, can help
│   ├── Draining                UNAVAILABLE          the replica finishes its work and leaves
│   ├── StreamClosed            UNAVAILABLE          the connection to a replica broke
│   └── ExpertUnavailable       UNAVAILABLE          no live replica holds the expert
└── InternalError               INTERNAL             our bug; the text stays in the log

On the wire an error is a google.rpc.Status with one ErrorInfo detail (reason = class name in
UPPER_SNAKE, domain "expertmesh", metadata = the error's fields); `from_status` rebuilds the same
class on the other side.
"""

import re
from typing import ClassVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

DOMAIN = "expertmesh"


class ExpertMeshError(Exception):
    """Base of all errors.

    Args:
        message: one or two sentences: what is wrong, what was expected, what to do.
        fields: the same facts for programs (values are turned into strings).
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    retryable: ClassVar[bool] = False
    """Whether the same call can succeed later or elsewhere without the caller changing it."""

    def __init__(self, message: str, /, **fields: object) -> None:
        super().__init__(message)
        self.message = message
        self.fields = {key: str(value) for key, value in fields.items()}

    @classmethod
    def reason(cls) -> str:
        """The class name as ErrorInfo spells it: QueueFull is QUEUE_FULL."""
        return re.sub(r"(?<=.)(?=[A-Z])", "_", cls.__name__).upper()

    def to_status(self) -> status_pb2.Status:
        """This error as a google.rpc.Status with its details."""
        info = error_details_pb2.ErrorInfo(
            reason=self.reason(), domain=DOMAIN, metadata=self.fields
        )
        detail = any_pb2.Any()
        detail.Pack(info)
        return status_pb2.Status(code=self.code.value[0], message=self.message, details=[detail])


class InvalidInput(ExpertMeshError):
    """A field is wrong: `InvalidInput.of("hidden.dtype", expected="bfloat16", got="float32")`."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    @classmethod
    def of(cls, field: str, *, expected: object, got: object, hint: str = "") -> "InvalidInput":
        """The usual message: field, what was expected, what came, what to do."""
        tail = f" {hint}" if hint else ""
        return cls(
            f"{field}: expected {expected}, got {got}.{tail}",
            field=field,
            expected=expected,
            got=got,
        )


class ConfigError(InvalidInput):
    """A field of the configuration file or of an EXPERTMESH_* variable is wrong."""


class NonFiniteInput(InvalidInput):
    """A tensor holds NaN or infinity and `reject_nonfinite` is on."""


class MalformedMessage(InvalidInput):
    """Bytes that do not parse as the message they should be."""


class CheckpointError(ExpertMeshError):
    """The checkpoint directory cannot be served."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class NotACheckpoint(CheckpointError):
    """No Hugging Face checkpoint at this path."""


class MissingShard(CheckpointError):
    """The index names a safetensors file that does not exist."""


class DamagedShard(CheckpointError):
    """A safetensors file that is truncated or whose header cannot be read."""


class UnsupportedCheckpoint(CheckpointError):
    """A model family or a tensor layout this version does not read."""


class InsufficientMemory(ExpertMeshError):
    """The experts of a group need more memory than the device has free."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class UnknownModel(ExpertMeshError):
    """The named model is not served here."""

    code = grpc.StatusCode.NOT_FOUND


class UnknownExpert(ExpertMeshError):
    """The model has no such layer or expert, or this replica does not hold it."""

    code = grpc.StatusCode.NOT_FOUND


class MessageTooLarge(ExpertMeshError):
    """A message above the configured size limit; split it or raise `max_message_bytes`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class QueueFull(ExpertMeshError):
    """A bounded queue is full: the callee is overloaded, nothing was accepted."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True


class DeadlineExceeded(ExpertMeshError):
    """No answer within the time the caller gave."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Unavailable(ExpertMeshError):
    """The callee cannot answer now; another one, or a later call, can."""

    code = grpc.StatusCode.UNAVAILABLE
    retryable = True


class Draining(Unavailable):
    """The replica finishes what it has and takes nothing new."""


class StreamClosed(Unavailable):
    """The connection to a replica broke before it answered."""


class ExpertUnavailable(Unavailable):
    """No live replica holds an expert that the request needs."""


class InternalError(ExpertMeshError):
    """A bug of ours. The cause is in the log of the process that raised it, never on the wire."""


def _classes(base: type[ExpertMeshError]) -> dict[str, type[ExpertMeshError]]:
    found = {base.reason(): base}
    for child in base.__subclasses__():
        found |= _classes(child)
    return found


_BY_REASON = _classes(ExpertMeshError)
_BY_CODE: dict[int, type[ExpertMeshError]] = {
    code_pb2.INVALID_ARGUMENT: InvalidInput,
    code_pb2.NOT_FOUND: UnknownModel,
    code_pb2.RESOURCE_EXHAUSTED: QueueFull,
    code_pb2.FAILED_PRECONDITION: CheckpointError,
    code_pb2.DEADLINE_EXCEEDED: DeadlineExceeded,
    code_pb2.UNAVAILABLE: Unavailable,
    code_pb2.CANCELLED: Unavailable,  # what a stopping server answers to a call just arrived
}
_OVERSIZE = "message larger than max"  # gRPC's own refusal has the code of a full queue


def from_status(status: status_pb2.Status) -> ExpertMeshError:
    """The error a status stands for; a foreign status becomes the nearest class by its code."""
    for detail in status.details:
        info = _error_info(detail)
        if info.domain == DOMAIN and info.reason in _BY_REASON:
            return _BY_REASON[info.reason](status.message, **dict(info.metadata))
    if _OVERSIZE in status.message and status.code == code_pb2.RESOURCE_EXHAUSTED:
        return MessageTooLarge(status.message)
    return _BY_CODE.get(status.code, InternalError)(status.message)


def _error_info(detail: any_pb2.Any) -> error_details_pb2.ErrorInfo:
    """The detail as an ErrorInfo; an empty one if it is something else, or garbage."""
    info = error_details_pb2.ErrorInfo()
    try:
        detail.Unpack(info)
    except DecodeError:
        info.Clear()
    return info
