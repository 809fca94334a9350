"""The requests of routers on this host, over a Unix socket instead of gRPC.

The messages of ComputeStream with the same answers, without what HTTP/2 and its threads cost.
"""

import asyncio
import logging
import secrets
import socket

from expertmesh.experts.answering import Answering, Reply
from expertmesh.experts.servicer import ExpertServicer
from expertmesh.runtime import frames, wire
from expertmesh.runtime.frames import FrameSocket
from expertmesh.v1 import expert_pb2

logger = logging.getLogger(__name__)


class LocalServer:
    """Listens from `start` to `stop`, on the replica's event loop."""

    def __init__(self, servicer: ExpertServicer, max_message_bytes: int) -> None:
        self._servicer = servicer
        self._max_message_bytes = max_message_bytes
        self._listener: socket.socket | None = None
        self._connections: set[_Connection] = set()

    def start(self) -> str:
        """Returns the socket's name, or "" where there are no such sockets."""
        if not frames.supported():
            return ""
        name = f"expertmesh-{secrets.token_hex(16)}"
        self._listener = frames.listen(name)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)
        return name

    def _accept(self) -> None:
        assert self._listener
        try:
            sock, _ = self._listener.accept()
        except OSError as error:  # the caller has gone again, or no file descriptor is left
            logger.warning("a local connection was not accepted: %s", error)
            return
        if not frames.is_same_user(sock):
            logger.warning("a local connection of another user was refused")
            sock.close()
            return
        sock.setblocking(False)
        self._connections.add(_Connection(sock, self._servicer, self._max_message_bytes, self))

    def forget(self, connection: "_Connection") -> None:
        """A connection has ended."""
        self._connections.discard(connection)

    async def stop(self, grace_s: float) -> None:
        """Take no new connections, send what is being computed for at most `grace_s`, then cut."""
        if self._listener:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        finishing = [asyncio.create_task(own.finish()) for own in self._connections]
        if finishing:
            await asyncio.wait(finishing, timeout=grace_s)
        for connection in list(self._connections):
            connection.close()


class _Connection:
    """One router's."""

    def __init__(
        self,
        sock: socket.socket,
        servicer: ExpertServicer,
        max_message_bytes: int,
        server: LocalServer,
    ) -> None:
        self._servicer = servicer
        self._server = server
        self._answers = Answering(self._send)
        self._frames = FrameSocket(
            sock, max_message_bytes, self._on_message, self._on_end, patient=True
        )

    def _on_message(self, data: wire.Encoded) -> None:
        header, payload = wire.decode(expert_pb2.ComputeRequest, data)
        if header.cancels and self._answers.cancel(header):
            return
        if reply := self._servicer.answer_at_once(header, payload):
            self._send(reply)
        else:
            task = asyncio.get_running_loop().create_task(self._answer(header, payload))
            self._answers.add(header.id, task)

    async def _answer(self, header: expert_pb2.ComputeRequest, payload: memoryview) -> None:
        self._send(await self._servicer.answer(header, payload))

    def _send(self, reply: Reply) -> None:
        response, rows = reply
        self._frames.send(wire.encode_head(response, rows), rows)

    def _on_end(self, error: BaseException | None) -> None:
        if error:
            logger.warning("a local connection broke: %s", error)
        self._answers.cancel_all()
        self._server.forget(self)

    async def finish(self) -> None:
        """Until every request so far is answered and its answer taken."""
        await self._answers.finish()
        await self._frames.flush()

    def close(self) -> None:
        """Cut the connection."""
        self._frames.close()
