"""The answers of one gRPC stream on their way to a caller that may be slow to take them."""

import asyncio
from typing import Any

MAX_UNSENT_BYTES = 16 << 20
"""While more wait to be taken, no further request of the stream is read."""


class Outbox:
    """Reads and writes a `ComputeStream`.

    Args:
        context: of the call.
    """

    def __init__(self, context: Any, max_unsent_bytes: int = MAX_UNSENT_BYTES) -> None:
        self._context = context
        self._max_unsent_bytes = max_unsent_bytes
        self._write_lock = asyncio.Lock()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self.unsent_bytes = 0

    async def read(self) -> Any:
        """The next request, or EOF, as soon as its answer would find room."""
        await self._has_room.wait()
        return await self._context.read()

    async def send(self, data: bytes) -> None:
        """Write an answer when those before it are written."""
        self._count(len(data))
        try:
            async with self._write_lock:  # writes of one grpc.aio stream must not overlap
                await self._context.write(data)
        finally:
            self._count(-len(data))

    def _count(self, num_bytes: int) -> None:
        self.unsent_bytes += num_bytes
        if self.unsent_bytes > self._max_unsent_bytes:
            self._has_room.clear()
        else:
            self._has_room.set()
