"""What is fuzzed: each target takes any bytes and ends well, or in an ExpertMeshError that is not
our bug. Anything else that is raised is a finding.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.message import DecodeError, Message

from expertmesh.router.heartbeat import why_unusable
from expertmesh.router.snapshot import Snapshot
from expertmesh.runtime import wire
from expertmesh.runtime.error_status import from_status
from expertmesh.runtime.errors import ExpertMeshError, InternalError
from expertmesh.runtime.frames import FrameSocket
from expertmesh.runtime.state import parse_record
from expertmesh.runtime.tensors import from_proto
from expertmesh.runtime.trace_context import is_unsampled, links_to
from expertmesh.v1 import control_pb2, expert_pb2, generate_pb2, router_pb2, tensor_pb2

Target = Callable[[bytes], None]

FRAMED: tuple[type[Message], ...] = (expert_pb2.ComputeRequest, expert_pb2.ComputeResponse)
WHOLE: tuple[type[Message], ...] = (
    router_pb2.DispatchRequest,
    router_pb2.ForwardRequest,
    router_pb2.ExplainRequest,
    generate_pb2.GenerateRequest,
    generate_pb2.ScoreRequest,
    control_pb2.GetSnapshotRequest,
)
MAX_FRAME_BYTES = 1 << 17


def expected(error: ExpertMeshError) -> None:
    """Raise if the error says that there is a bug."""
    if isinstance(error, InternalError):
        raise AssertionError(f"answered as a bug: {error}") from error


def ends_well(run: Callable[[], Any]) -> Any:
    """The result, or None if there is an error that has its place."""
    try:
        return run()
    except ExpertMeshError as error:
        expected(error)
        return None


def parsed(message_type: type[Message], data: bytes) -> Message | None:
    """What protobuf itself makes of the data."""
    try:
        return message_type.FromString(data)
    except DecodeError:
        return None


def framed(data: bytes) -> None:
    """The hand-made framing reads what protobuf reads, and nothing else."""
    message_type = FRAMED[data[0] % len(FRAMED)] if data else FRAMED[0]
    rest = data[1:]
    decoded = ends_well(lambda: wire.decode(message_type, rest))
    reference = parsed(message_type, rest)
    if decoded is None:
        # protobuf knows nothing of checksums, and also takes groups of unknown fields, which proto3
        # does not have
        fits = reference is not None and not reference.checksum  # type: ignore[attr-defined]
        assert not fits or has_groups(rest), "refused, though protobuf can read it"
        return
    header, payload = decoded
    assert reference is not None, "read, though protobuf cannot"
    assert bytes(payload) == reference.rows  # type: ignore[attr-defined]
    reference.ClearField("rows")
    assert header.SerializeToString(deterministic=True) == reference.SerializeToString(
        deterministic=True
    )


def has_groups(data: bytes) -> bool:
    """Whether a field of the message is of a wire type that proto3 does not have."""
    view, at = memoryview(data), 0
    try:
        while at < len(view):
            at = wire._field(view, at)[2]
    except (ExpertMeshError, IndexError):
        return True
    return False


def whole(data: bytes) -> None:
    """The check of structure refuses no message of ordinary size."""
    message_type = WHOLE[data[0] % len(WHOLE)] if data else WHOLE[0]
    rest = data[1:]
    decoded = ends_well(lambda: wire.decode_whole(message_type, rest))
    reference = parsed(message_type, rest)
    if decoded is not None:
        assert reference is not None, "read, though protobuf cannot"
        # as bytes: NaN is not equal to itself
        assert decoded.SerializeToString(deterministic=True) == reference.SerializeToString(
            deterministic=True
        )
    else:
        assert reference is None or has_deep_groups(message_type, rest), "refused for no reason"


def has_deep_groups(message_type: type[Message], data: bytes) -> bool:
    """As `has_groups`, in the messages in the message as well."""
    try:
        wire._Structure().walk(memoryview(data), message_type.DESCRIPTOR)
    except (ExpertMeshError, IndexError):
        return True
    return False


def tensors(data: bytes) -> None:
    """A tensor as it comes in a request."""
    message = parsed(tensor_pb2.Tensor, data)
    if isinstance(message, tensor_pb2.Tensor):
        tensor = ends_well(lambda: from_proto(message, "hidden"))
        assert tensor is None or tensor.numel() * tensor.itemsize == len(message.data)


def records(data: bytes) -> None:
    """A record from Redis, on its way into a router's snapshot."""
    state = ends_well(lambda: parse_record(data))
    if state is not None:
        num_experts = {0: 8, 1: 8}
        wrong = why_unusable(state, num_experts)
        snapshot = Snapshot().with_state(state, 1.0, 0, wrong)
        snapshot.with_state(state, 2.0, 3, wrong).without(state.replica)


def statuses(data: bytes) -> None:
    """An error of a peer, and the same error sent on."""
    response = parsed(expert_pb2.ComputeResponse, data)
    if isinstance(response, expert_pb2.ComputeResponse):
        assert from_status(response.error).to_status().ByteSize() < 1 << 13


def traces(data: bytes) -> None:
    """A traceparent."""
    text = data.decode("utf-8", "replace")
    is_unsampled(text)
    for link in links_to([text]) or ():
        assert link.context.is_valid


class Loop:
    """An event loop for targets that need one."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()

    def run(self, work: Awaitable[Any]) -> Any:
        """To its end."""
        return self.loop.run_until_complete(work)

    def close(self) -> None:
        """Nothing runs on."""
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.run(asyncio.wait(tasks) if tasks else asyncio.sleep(0))
        self.loop.close()


def frames_target(loop: Loop) -> Target:
    """Pieces of a connection between two processes of one host."""

    async def receive(data: bytes) -> None:
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setblocking(False)
        got: list[bytes] = []
        end: list[BaseException | None] = []
        frames = FrameSocket(ours, MAX_FRAME_BYTES, lambda m: got.append(bytes(m)), end.append)
        at, cut = 0, 1 + (data[0] if data else 0)
        while at < len(data) and not frames.closed:
            theirs.send(data[at : at + cut])
            frames._readable()
            at, cut = at + cut, 1 + cut * 7 % 97
        theirs.close()
        while not frames.closed:
            frames._readable()
        assert got == reference_frames(data)
        assert end == [None] or isinstance(end[0], ExpertMeshError | OSError)

    return lambda data: loop.run(receive(data))


def reference_frames(data: bytes) -> list[bytes]:
    """The messages that the bytes hold, the slow way."""
    found, at = [], 0
    while at + 4 <= len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        if at + 4 + size > len(data):
            break
        found.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return found


def pure_targets(loop: Loop) -> dict[str, Target]:
    """Those that need nothing but the bytes."""
    return {
        "framed": framed,
        "whole": whole,
        "tensors": tensors,
        "records": records,
        "statuses": statuses,
        "traces": traces,
        "frames": frames_target(loop),
    }
