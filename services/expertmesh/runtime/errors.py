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
├── StaleController             FAILED_PRECONDITION  a newer controller has taken over
├── UnknownModel                NOT_FOUND            no such model here
├── UnknownExpert               NOT_FOUND            no such layer or expert in the model
├── Unauthenticated             UNAUTHENTICATED      no token, or none that this server takes
├── PermissionDenied            PERMISSION_DENIED    the caller is known and may not do this
├── MessageTooLarge             RESOURCE_EXHAUSTED   above max_message_bytes
├── QueueFull                   RESOURCE_EXHAUSTED   a bounded queue is full; retry later
│   └── CannotMakeIt            RESOURCE_EXHAUSTED   it would be too late; refused at once
├── RateLimited                 RESOURCE_EXHAUSTED   the caller is above its own limit
├── DeadlineExceeded            DEADLINE_EXCEEDED    no answer in the time the caller gave
├── Unavailable                 UNAVAILABLE          retrying, here or elsewhere, can help
│   ├── Draining                UNAVAILABLE          the replica finishes its work and leaves
│   ├── StreamClosed            UNAVAILABLE          the connection to a replica broke
│   ├── CorruptAnswer           UNAVAILABLE          a replica answered something else than asked
│   ├── WeightsUnavailable      UNAVAILABLE          a device did not get an expert's weights
│   └── ExpertUnavailable       UNAVAILABLE          no live replica holds the expert
├── Cancelled                   CANCELLED            its caller has taken the request back
└── InternalError               INTERNAL             our bug; the text stays in the log

On the wire an error is a google.rpc.Status with an ErrorInfo detail (reason = class name in
UPPER_SNAKE, domain "expertmesh", metadata = the error's fields) and, if the error says when to come
again, a RetryInfo; `error_status.from_status` rebuilds the same class on the other side.
"""

import re
from typing import ClassVar, Self

import grpc
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "expertmesh"


_MESSAGE_BYTES = 1024
_FIELD_BYTES = 128
_NAME_BYTES = 32
_MAX_FIELDS = 8


def _cut(text: str, num_bytes: int) -> str:
    """The text, or so much of its beginning that it takes no more than `num_bytes`."""
    data = text.encode("utf-8", "replace")
    if len(data) <= num_bytes:
        return data.decode()
    return data[: num_bytes - 3].decode("utf-8", "ignore") + "..."


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
        self.retry_after_s: float | None = None
        """When the same call can be expected to succeed; None: the callee does not know."""

    def after(self, retry_after_s: float | None) -> Self:
        """The same error, saying when to come again."""
        self.retry_after_s = retry_after_s
        return self

    @classmethod
    def reason(cls) -> str:
        """The class name as ErrorInfo spells it: QueueFull is QUEUE_FULL."""
        return re.sub(r"(?<=.)(?=[A-Z])", "_", cls.__name__).upper()

    def to_status(self) -> status_pb2.Status:
        """This error as a google.rpc.Status with its details.

        Long texts are cut, as they may repeat what a caller sent, and gRPC drops a whole status
        that does not fit its metadata.
        """
        info = error_details_pb2.ErrorInfo(
            reason=self.reason(),
            domain=DOMAIN,
            metadata={_cut(k, _NAME_BYTES): _cut(v, _FIELD_BYTES) for k, v in self._few_fields()},
        )
        status = status_pb2.Status(
            code=self.code.value[0], message=_cut(self.message, _MESSAGE_BYTES)
        )
        status.details.add().Pack(info)
        if self.retry_after_s is not None:  # generic clients know it as RetryInfo
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMicroseconds(round(self.retry_after_s * 1e6))
            status.details.add().Pack(retry)
        return status

    def _few_fields(self) -> list[tuple[str, str]]:
        return list(self.fields.items())[:_MAX_FIELDS]


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


class StaleController(ExpertMeshError):
    """A replica has seen a newer controller than the one that asks; `seen` is its epoch."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class UnknownModel(ExpertMeshError):
    """The named model is not served here."""

    code = grpc.StatusCode.NOT_FOUND


class UnknownExpert(ExpertMeshError):
    """The model has no such layer or expert, or this replica does not hold it."""

    code = grpc.StatusCode.NOT_FOUND


class Unauthenticated(ExpertMeshError):
    """The call has no token, or none that this server takes."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(ExpertMeshError):
    """The caller is known, and may not do this: a scope, or the mesh's identity, is missing."""

    code = grpc.StatusCode.PERMISSION_DENIED


class MessageTooLarge(ExpertMeshError):
    """A message above the configured size limit; split it or raise `max_message_bytes`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class QueueFull(ExpertMeshError):
    """A bounded queue is full: the callee is overloaded, nothing was accepted."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True


class CannotMakeIt(QueueFull):
    """The callee has so much to do that the answer would come too late; it did not begin."""


class RateLimited(ExpertMeshError):
    """The caller is above its own limit."""

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


class CorruptAnswer(Unavailable):
    """A replica's answer is not of the form that was asked for."""


class WeightsUnavailable(Unavailable):
    """A replica could not bring the weights of an expert it holds to its device."""


class ExpertUnavailable(Unavailable):
    """No live replica holds an expert that the request needs."""


class Cancelled(ExpertMeshError):
    """Its caller has taken the request back."""

    code = grpc.StatusCode.CANCELLED


class InternalError(ExpertMeshError):
    """A bug of ours. The cause is in the log of the process that raised it, never on the wire."""
