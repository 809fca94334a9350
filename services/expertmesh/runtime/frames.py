"""Messages between two processes of one host: 4 bytes of length (little-endian), then the message.

Over a Unix socket of Linux's abstract name space, whose names belong to a network namespace and
vanish with their process. Both ends insist on the same user. A message costs one system call to
send and one to receive, and wakes no thread but its reader: a sixth of what it costs over gRPC.
"""

import asyncio
import os
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable

from expertmesh.runtime.errors import ExpertMeshError, MessageTooLarge
from expertmesh.runtime.wire import Buffer, Encoded

_LENGTH = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")
_SCRATCH_BYTES = 64 << 10
_BACKLOG = 128

OnMessage = Callable[[Encoded], None]
OnEnd = Callable[[BaseException | None], None]


def supported() -> bool:
    """Whether this system has abstract names and tells who is at the other end."""
    return sys.platform == "linux"


def listen(name: str) -> socket.socket:
    """A listening socket; raises OSError if the name is taken."""
    listener = socket.socket(socket.AF_UNIX)
    listener.setblocking(False)
    listener.bind(f"\0{name}")
    listener.listen(_BACKLOG)
    return listener


def dial(name: str) -> socket.socket | None:
    """A connection to a listener of this host and user; None if there is none."""
    if not supported():
        return None
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    try:
        sock.connect(f"\0{name}")
        if is_same_user(sock):
            return sock
    except OSError:  # another host, another network namespace, or its backlog is full
        pass
    sock.close()
    return None


def is_same_user(sock: socket.socket) -> bool:
    """Whether the process at the other end runs as this one's user."""
    peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(peer)[1]) == os.getuid()


class FrameSocket:
    """One connection; created and used on a running event loop.

    Args:
        on_message: gets each message; the buffer is its own to keep. An ExpertMeshError that it
            raises ends the connection.
        on_end: told once why there is no connection any more; None when the peer closed it or
            `close` did.
        patient: read nothing while the peer is slow to take what was sent. For servers only: two
            patient ends could wait for each other.
    """

    def __init__(
        self,
        sock: socket.socket,
        max_message_bytes: int,
        on_message: OnMessage,
        on_end: OnEnd,
        *,
        patient: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._max_message_bytes = max_message_bytes
        self._on_message = on_message
        self._on_end = on_end
        self._patient = patient
        self._scratch = bytearray(_SCRATCH_BYTES)
        self._scratch_view = memoryview(self._scratch)
        self._num_scratch = 0
        """Bytes received into the scratch memory and not yet delivered."""
        self._large = bytearray()
        """A message that the scratch memory cannot hold."""
        self._num_large = 0
        self._unsent: deque[memoryview] = deque()
        self._sent = asyncio.Event()
        self._sent.set()
        self.on_sent: Callable[[], None] = lambda: None
        """Called when the peer has taken what it was slow to take."""
        self.closed = False
        self._loop.add_reader(sock, self._readable)

    # -- sending ---------------------------------------------------------------------------------

    def send(self, *parts: Buffer) -> None:
        """One message, its parts one after the other; what the peer does not take yet is kept.

        The parts are flat bytes and must not change afterwards.
        """
        if self.closed:
            return
        num_bytes = sum(map(len, parts))
        if num_bytes <= _SCRATCH_BYTES:
            views = [memoryview(b"".join((_LENGTH.pack(num_bytes), *parts)))]
        else:
            views = [memoryview(_LENGTH.pack(num_bytes)), *(memoryview(part) for part in parts)]
        if not self._unsent:
            views = self._try(views)
            if not views:
                return
            self._sent.clear()
            self._loop.add_writer(self._sock, self._writable)
            if self._patient:
                self._loop.remove_reader(self._sock)
        self._unsent.extend(views)

    def _try(self, views: list[memoryview]) -> list[memoryview]:
        """What is left of the parts when the peer has taken what it takes at once."""
        try:
            num_sent = self._sock.sendmsg(views)
        except BlockingIOError:
            return views
        except OSError as error:
            self._end(error)
            return []
        for index, view in enumerate(views):
            if num_sent < view.nbytes:
                return [view[num_sent:], *views[index + 1 :]]
            num_sent -= view.nbytes
        return []

    def _writable(self) -> None:
        self._unsent = deque(self._try(list(self._unsent)))
        if not self._unsent and not self.closed:
            self._loop.remove_writer(self._sock)
            self._sent.set()
            if self._patient:
                self._loop.add_reader(self._sock, self._readable)
            self.on_sent()

    @property
    def is_sending(self) -> bool:
        """Whether the peer has not taken everything yet."""
        return bool(self._unsent)

    async def flush(self) -> None:
        """Until the peer has taken everything, or is gone."""
        await self._sent.wait()

    # -- receiving -------------------------------------------------------------------------------

    def _readable(self) -> None:
        memory = self._scratch_view
        if self._large:
            memory = memoryview(self._large)[self._num_large :]
        elif self._num_scratch:
            memory = memory[self._num_scratch :]
        try:
            num_bytes = self._sock.recv_into(memory)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(error)
            return
        if not num_bytes:
            self._end(None)
        elif self._large:
            self._received_large(num_bytes)
        else:
            self._received(self._num_scratch + num_bytes)

    def _received_large(self, num_bytes: int) -> None:
        self._num_large += num_bytes
        if self._num_large == len(self._large):
            message, self._large, self._num_large = self._large, bytearray(), 0
            self._deliver(message)

    def _received(self, num_bytes: int) -> None:
        """Deliver the messages that the first bytes of the scratch memory hold, keep the rest."""
        start, size = 0, 0
        while num_bytes - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._scratch, start)
            stop = start + _LENGTH.size + size
            if stop > num_bytes:
                break
            self._deliver(bytes(self._scratch_view[start + _LENGTH.size : stop]))
            if self.closed:
                return
            start = stop
        else:
            size = 0
        if start == num_bytes:  # as a rule: nothing of a next message has come yet
            self._num_scratch = 0
        elif size > self._max_message_bytes:
            self._end(_too_large(size, self._max_message_bytes))
        else:
            self._keep(start, num_bytes, size)

    def _deliver(self, message: Encoded) -> None:
        try:
            self._on_message(message)
        except ExpertMeshError as error:  # not a message: nothing after it can be trusted
            self._end(error)

    def _keep(self, start: int, stop: int, size: int) -> None:
        """What has come of a message of `size` bytes (0: not known yet), to go on from there."""
        rest = bytes(self._scratch_view[start:stop])
        if _LENGTH.size + size > _SCRATCH_BYTES:
            self._num_large, self._num_scratch = len(rest) - _LENGTH.size, 0
            self._large = bytearray(size)
            self._large[: self._num_large] = rest[_LENGTH.size :]
            return
        self._num_scratch = len(rest)
        self._scratch[: len(rest)] = rest

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Cut the connection; what was not sent is lost."""
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._unsent.clear()
        self._sent.set()
        self._on_end(error)


def _too_large(num_bytes: int, max_message_bytes: int) -> ExpertMeshError:
    return MessageTooLarge(
        f"a message of {num_bytes} bytes is above max_message_bytes {max_message_bytes}",
        bytes=num_bytes,
        max_message_bytes=max_message_bytes,
    )
