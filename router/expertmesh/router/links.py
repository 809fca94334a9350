"""The two ways to a replica: a gRPC stream, or a Unix socket if it is on this host.

Both carry the same messages (docs/wire.md); a link knows nothing of what is in them.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import grpc

from expertmesh.router.outgoing import Outgoing
from expertmesh.runtime.channels import ANSWER_HEADER_BYTES, connect
from expertmesh.runtime.errors import ExpertMeshError
from expertmesh.runtime.frames import FrameSocket, OnEnd, OnMessage, dial
from expertmesh.runtime.security.access import PLAIN, Access
from expertmesh.runtime.wire import Buffer

_METHOD = "/expertmesh.v1.ExpertService/ComputeStream"


class Link(Protocol):
    """A connection that carries messages both ways, in order."""

    def check_room(self, num_bytes: int) -> None:
        """Make sure that a message of that size may be sent.

        Raises:
            QueueFull: too much waits to be taken by the replica.
        """
        ...

    def send(self, number: int, *parts: Buffer) -> None:
        """One message: its parts, one behind the other.

        Args:
            number: by which the link asks whether it is still wanted when its turn comes.
        """
        ...

    async def close(self) -> None:
        """Cut the connection."""
        ...


def open_link(
    address: str,
    local_socket: str,
    max_message_bytes: int,
    on_message: OnMessage,
    on_end: OnEnd,
    is_wanted: Callable[[int], bool],
    access: Access = PLAIN,
) -> Link:
    """A link to a replica, local if its socket is there for us.

    Args:
        address: "host:port" of its gRPC server.
        local_socket: name of its Unix socket, or "".
        on_message: gets each message.
        on_end: told once, why there will be no more; None without an error.
        is_wanted: whether a message that waits should still be sent.
        access: how to connect over gRPC. A Unix socket needs none: both ends are the same user.
    """
    sock = dial(local_socket) if local_socket else None
    if sock is not None:
        most_bytes = max_message_bytes + ANSWER_HEADER_BYTES
        return LocalLink(FrameSocket(sock, most_bytes, on_message, on_end), is_wanted)
    return GrpcLink(address, max_message_bytes, on_message, on_end, is_wanted, access)


class LocalLink:
    """A Unix socket: what is sent is on its way when `send` returns, unless the replica is slow to
    take what was sent before."""

    def __init__(self, frames: FrameSocket, is_wanted: Callable[[int], bool]) -> None:
        self._frames = frames
        self._outgoing = Outgoing(is_wanted)
        frames.on_sent = self._send_next

    def check_room(self, num_bytes: int) -> None:
        """See `Link.check_room`."""
        self._outgoing.check_room(num_bytes)

    def send(self, number: int, *parts: Buffer) -> None:
        """See `Link.send`."""
        if self._frames.is_sending:
            self._outgoing.add(number, b"".join(parts))
        else:
            self._frames.send(*parts)

    def _send_next(self) -> None:
        while not self._frames.is_sending and (data := self._outgoing.next()):
            self._frames.send(data)

    async def close(self) -> None:
        """See `Link.close`."""
        self._frames.close()


class GrpcLink:
    """A long-lived gRPC stream.

    Two tasks live as long as it does: one writes, one reads. A message costs neither a task nor a
    timer of its own.
    """

    def __init__(
        self,
        address: str,
        max_message_bytes: int,
        on_message: OnMessage,
        on_end: OnEnd,
        is_wanted: Callable[[int], bool],
        access: Access = PLAIN,
    ) -> None:
        self._on_message = on_message
        self._on_end = on_end
        self._channel = connect(address, max_message_bytes, access)
        # identity serializers: payloads are framed by `wire`
        self._call: Any = self._channel.stream_stream(_METHOD)()
        self._outgoing = Outgoing(is_wanted)
        self._more = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._write(), name=f"writes to {address}"),
            asyncio.create_task(self._read(), name=f"reads from {address}"),
        ]

    def check_room(self, num_bytes: int) -> None:
        """See `Link.check_room`."""
        self._outgoing.check_room(num_bytes)

    def send(self, number: int, *parts: Buffer) -> None:
        """See `Link.send`."""
        self._outgoing.add(number, b"".join(parts))
        self._more.set()

    async def _write(self) -> None:
        try:
            while True:
                await self._more.wait()
                self._more.clear()
                while data := self._outgoing.next():
                    await self._call.write(data)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            self._on_end(error)

    async def _read(self) -> None:
        error: BaseException | None = None
        try:
            while (data := await self._call.read()) is not grpc.aio.EOF:
                self._on_message(data)
        except (grpc.RpcError, ExpertMeshError) as broken:
            error = broken
        finally:
            self._on_end(error)

    async def close(self) -> None:
        """See `Link.close`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()
