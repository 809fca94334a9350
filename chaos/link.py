"""A TCP connection that misbehaves as networks do: late, slow, silent, cut, or with wrong bytes.

A proxy in user space: it needs no root and no kernel module, and a test may use it on its own loop.
"""

import asyncio
import contextlib
import math
import socket
import ssl
import struct
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from random import Random
from typing import Any

_CHUNK_BYTES = 1 << 16
_QUEUED_CHUNKS = 64
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends RST."""

Chunks = asyncio.Queue[tuple[float, bytes]]
"""(when they were read, bytes); b"" is the end."""


@dataclass
class Way:
    """One direction of a link. May be changed while bytes are on it."""

    delay_s: float = 0.0
    bytes_per_s: float = math.inf
    change: Callable[[bytes], bytes] = bytes
    """What becomes of a piece of what is sent."""

    def __post_init__(self) -> None:
        self._flowing = asyncio.Event()
        self._flowing.set()

    def silence(self) -> None:
        """Let nothing through; it is kept, as TCP would send it again."""
        self._flowing.clear()

    def flow(self) -> None:
        """Let everything through that was kept, and what comes."""
        self._flowing.set()

    async def carry(self, sent_s: float, data: bytes) -> bytes:
        """What arrives of `data`, read at `sent_s` by the loop's clock, when it arrives."""
        wait_s = sent_s + self.delay_s - asyncio.get_running_loop().time()
        await asyncio.sleep(max(wait_s, 0.0))
        await self._flowing.wait()
        if self.bytes_per_s < math.inf:
            await asyncio.sleep(len(data) / self.bytes_per_s)
        return self.change(data)


def flips(frac: float, random: Random) -> Callable[[bytes], bytes]:
    """A change: one bit is turned over in this share of the pieces."""

    def flip(data: bytes) -> bytes:
        if random.random() >= frac:
            return data
        spoiled = bytearray(data)
        spoiled[random.randrange(len(data))] ^= 1 << random.randrange(8)
        return bytes(spoiled)

    return flip


class Link:
    """Forwards connections to `target`, as `there` and `back` say.

    `cut` breaks them and refuses new ones until `mend`.

    Args:
        host: address of this end; default the target's.
        tls: at this end, for a target that has none.
    """

    def __init__(self, target: str, host: str = "", tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        target_host, _, port = target.rpartition(":")
        self._target = (target_host, int(port))
        self._host = host or target_host
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.num_bytes = 0
        """Read, of both ways."""
        self.there = Way()
        """From who connected to the target."""
        self.back = Way()

    async def __aenter__(self) -> "Link":
        await self.mend()
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.cut()

    @property
    def address(self) -> str:
        """ "host:port" of this end."""
        return f"{self._host}:{self.port}"

    @property
    def ways(self) -> tuple[Way, Way]:
        """Both directions."""
        return self.there, self.back

    def silence(self) -> None:
        """Let nothing through either way; nothing is closed."""
        for way in self.ways:
            way.silence()

    def flow(self) -> None:
        """End the silence."""
        for way in self.ways:
            way.flow()

    async def mend(self) -> None:
        """Accept connections, at the same port as before."""
        self._server = await asyncio.start_server(
            self._accept, self._host, self.port, ssl=self._tls
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Reset every connection and listen no more."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for writer in self._writers:
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):  # it may be closed already
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            target_reader, target_writer = await asyncio.open_connection(*self._target)
        except OSError:  # nobody there: as if it had refused
            writer.transport.abort()
            return
        both = {writer, target_writer}
        self._writers |= both
        pumps = [
            self._start(self._pump(self.there, reader, target_writer)),
            self._start(self._pump(self.back, target_reader, writer)),
        ]
        await asyncio.wait(pumps)
        self._writers -= both

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _pump(
        self, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Bytes of one direction; reading goes on while earlier bytes are under way."""
        chunks: Chunks = asyncio.Queue(_QUEUED_CHUNKS)
        reading = self._start(_read(reader, chunks))
        try:
            while True:
                sent_s, data = await chunks.get()
                if not data:
                    break
                self.num_bytes += len(data)
                writer.write(await way.carry(sent_s, data))
                await writer.drain()
        except OSError:
            pass
        finally:
            reading.cancel()
            writer.close()


async def _read(reader: asyncio.StreamReader, chunks: Chunks) -> None:
    clock = asyncio.get_running_loop().time
    data = b"-"
    while data:
        try:
            data = await reader.read(_CHUNK_BYTES)
        except OSError:
            data = b""
        await chunks.put((clock(), data))
