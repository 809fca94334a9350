"""A caller that does not take its answers is not read from, and the answers keep their order."""

import asyncio

from expertmesh.experts.outbox import Outbox


class Context:
    """A stream whose writes end when the test says."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.num_reads = 0
        self._may_write = asyncio.Semaphore(0)

    async def read(self) -> bytes:
        self.num_reads += 1
        return b"request"

    async def write(self, data: bytes) -> None:
        await self._may_write.acquire()
        self.written.append(data)

    def take(self) -> None:
        """One answer."""
        self._may_write.release()


async def test_requests_wait_for_answers_to_be_taken() -> None:
    context = Context()
    outbox = Outbox(context, max_unsent_bytes=10)
    assert await outbox.read() == b"request"
    sends = [asyncio.create_task(outbox.send(bytes([number]) * 6)) for number in range(3)]
    await asyncio.sleep(0)
    assert outbox.unsent_bytes == 18
    reading = asyncio.create_task(outbox.read())
    await asyncio.sleep(0.01)
    assert context.num_reads == 1
    context.take()
    await sends[0]
    await asyncio.sleep(0.01)
    assert context.num_reads == 1, "12 bytes are still too many"
    sends[2].cancel()
    assert await reading == b"request"
    context.take()
    await sends[1]
    assert context.written == [b"\0" * 6, b"\1" * 6]
    assert outbox.unsent_bytes == 0
