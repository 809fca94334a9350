"""The error tree in the module's docstring is the tree in the code, and crosses the wire whole."""

import pickle
import re

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from expertmesh.runtime import errors
from expertmesh.runtime.error_status import from_status
from expertmesh.runtime.errors import (
    CannotMakeIt,
    CheckpointError,
    CorruptAnswer,
    DeadlineExceeded,
    Draining,
    ExpertMeshError,
    ExpertUnavailable,
    InternalError,
    InvalidInput,
    MessageTooLarge,
    PermissionDenied,
    QueueFull,
    RateLimited,
    StreamClosed,
    Unauthenticated,
    Unavailable,
    UnknownModel,
    WeightsUnavailable,
)

CLASSES = [
    found
    for found in vars(errors).values()
    if isinstance(found, type) and issubclass(found, ExpertMeshError)
]
LINE = re.compile(r"^(?P<bars>[│├└─ ]*)(?P<name>[A-Z]\w+)(?: +(?P<code>[A-Z_]+)  .+)?$")


def drawn_tree() -> dict[str, tuple[str, str]]:
    """Class -> (base, status code) as the docstring draws them."""
    assert errors.__doc__
    path: list[str] = []
    found = {}
    for line in errors.__doc__.splitlines():
        match = LINE.match(line)
        if match and (match["bars"] or match["name"] == "ExpertMeshError"):
            path = [*path[: len(match["bars"]) // 4], match["name"]]
            if match["bars"]:
                found[match["name"]] = (path[-2], match["code"])
    return found


def test_the_drawn_tree_is_the_tree() -> None:
    actual = {
        kind.__name__: (kind.__base__.__name__, kind.code.name)
        for kind in CLASSES
        if kind is not ExpertMeshError and kind.__base__
    }
    assert drawn_tree() == actual
    assert len(actual) > 15


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_crosses_the_wire(kind: type[ExpertMeshError]) -> None:
    data = kind("g\u00fcnstig: 3 of 4", layer=3, expert="x").to_status().SerializeToString()
    status = status_pb2.Status.FromString(data)
    assert status.code == kind.code.value[0]
    back = from_status(status)
    assert type(back) is kind
    assert back.message == str(back) == "g\u00fcnstig: 3 of 4"
    assert back.fields == {"layer": "3", "expert": "x"}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_crosses_processes(kind: type[ExpertMeshError]) -> None:
    back = pickle.loads(pickle.dumps(kind("full", rows=3)))
    assert (type(back), back.message, back.fields) == (kind, "full", {"rows": "3"})


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_has_its_own_reason_in_upper_snake(kind: type[ExpertMeshError]) -> None:
    words = re.findall("[A-Z][a-z]*", kind.__name__)
    assert kind.reason() == "_".join(words).upper()
    assert [other for other in CLASSES if other.reason() == kind.reason()] == [kind]


def test_reasons_are_those_that_clients_were_promised() -> None:
    assert QueueFull.reason() == "QUEUE_FULL"
    assert errors.NotACheckpoint.reason() == "NOT_A_CHECKPOINT"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (code_pb2.INVALID_ARGUMENT, InvalidInput),
        (code_pb2.NOT_FOUND, UnknownModel),
        (code_pb2.RESOURCE_EXHAUSTED, QueueFull),
        (code_pb2.FAILED_PRECONDITION, CheckpointError),
        (code_pb2.DEADLINE_EXCEEDED, DeadlineExceeded),
        (code_pb2.UNAVAILABLE, Unavailable),
        (code_pb2.INTERNAL, InternalError),
        (code_pb2.UNKNOWN, InternalError),
        (code_pb2.PERMISSION_DENIED, PermissionDenied),
        (code_pb2.UNAUTHENTICATED, Unauthenticated),
        (code_pb2.ABORTED, InternalError),
        (999, InternalError),
    ],
)
def test_a_foreign_status_becomes_the_nearest_class(code: int, kind: type[ExpertMeshError]) -> None:
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="elsewhere"))
    help_detail = any_pb2.Any()
    help_detail.Pack(error_details_pb2.Help())
    error = from_status(status_pb2.Status(code=code, message="no", details=[help_detail, info]))
    assert type(error) is kind
    assert error.message == "no"


def test_a_reason_of_a_newer_peer_falls_back_to_the_code() -> None:
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason="NOT_YET_INVENTED", domain=errors.DOMAIN))
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="no", details=[info])
    assert type(from_status(status)) is Unavailable


def test_a_message_above_grpcs_own_limit_is_not_a_full_queue() -> None:
    text = "SERVER: Received message larger than max (5000 vs. 1000)"
    error = from_status(status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message=text))
    assert type(error) is MessageTooLarge
    assert error.message == text


@pytest.mark.parametrize("key", ["message", "self", "code", "not an identifier"])
def test_no_metadata_key_of_a_peer_can_break_the_reader(key: str) -> None:
    info = any_pb2.Any()
    info.Pack(
        error_details_pb2.ErrorInfo(reason="DRAINING", domain=errors.DOMAIN, metadata={key: "x"})
    )
    error = from_status(status_pb2.Status(code=code_pb2.UNAVAILABLE, message="no", details=[info]))
    assert type(error) is Draining
    assert (error.message, error.fields) == ("no", {key: "x"})
    assert error.code is grpc.StatusCode.UNAVAILABLE


def test_what_can_be_retried() -> None:
    retryable = {kind for kind in CLASSES if kind.retryable}
    assert retryable == {
        QueueFull,
        RateLimited,
        CannotMakeIt,
        Unavailable,
        Draining,
        StreamClosed,
        CorruptAnswer,
        WeightsUnavailable,
        ExpertUnavailable,
    }


def test_what_a_caller_sent_cannot_make_a_status_too_large_for_grpc() -> None:
    error = UnknownModel("\U0001f600" * 10_000, **{f"x{n}" * 100: "y" * 10_000 for n in range(99)})
    status = error.to_status()
    assert status.ByteSize() < 3000
    assert len(status.message.encode()) <= 1024
    assert status.message.endswith("...")
    assert UnknownModel("lone \ud800").to_status().message == "lone ?"


def test_a_retry_delay_is_told_as_generic_clients_know_it() -> None:
    status = RateLimited("slowly").after(1.5).to_status()
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.ToTimedelta().total_seconds() == 1.5
    assert from_status(status).retry_after_s == 1.5


@pytest.mark.parametrize(("seconds", "nanos"), [(-1, 0), (0, -5), (10**11, 0), (86400, 1)])
def test_a_peers_nonsense_is_no_retry_delay(seconds: int, nanos: int) -> None:
    status = QueueFull("full").to_status()
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.seconds, retry.retry_delay.nanos = seconds, nanos
    status.details.add().Pack(retry)
    error = from_status(status)
    assert error.retry_after_s is None
    assert len(error.to_status().details) == 1


def test_the_usual_message_of_a_wrong_field() -> None:
    error = InvalidInput.of("hidden.dtype", expected="bfloat16", got="float32", hint="Cast it.")
    assert error.message == "hidden.dtype: expected bfloat16, got float32. Cast it."
    assert error.fields == {"field": "hidden.dtype", "expected": "bfloat16", "got": "float32"}
    assert type(errors.ConfigError.of("a", expected=1, got=2)) is errors.ConfigError
