"""The fault proxy: every fault does what it says, one way only, and ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest
from chaos.link import Link, flips

SOON_S = 0.1
DEADLINE_S = 10.0


class Ends:
    """A connection through a link: what each end gets."""

    def __init__(
        self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.link = link
        self.reader = reader
        self.writer = writer

    async def echo(self, data: bytes) -> bytes:
        """What comes back."""
        self.writer.write(data)
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.readexactly(len(data))

    async def nothing_comes(self, data: bytes) -> bool:
        """Whether no answer comes soon."""
        self.writer.write(data)
        try:
            async with asyncio.timeout(SOON_S):
                await self.reader.readexactly(1)
        except TimeoutError:
            return True
        return False


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Ends, list[bytes]]]:
    """A link to an echo server, and what that has heard."""
    heard: list[bytes] = []

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            heard.append(data)
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, Link(f"127.0.0.1:{port}") as link:
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        yield Ends(link, reader, writer), heard
        writer.close()


async def test_bytes_pass_both_ways() -> None:
    async with connected() as (ends, _):
        data = Random(0).randbytes(1 << 20)
        assert await ends.echo(data) == data


async def test_answers_lost_and_requests_lost_are_two_things() -> None:
    async with connected() as (ends, heard):
        ends.link.back.silence()
        assert await ends.nothing_comes(b"a")
        assert heard == [b"a"]
        ends.link.back.flow()
        async with asyncio.timeout(DEADLINE_S):
            assert await ends.reader.readexactly(1) == b"a"
        ends.link.there.silence()
        assert await ends.nothing_comes(b"b")
        assert heard == [b"a"]
        ends.link.there.flow()
        async with asyncio.timeout(DEADLINE_S):
            assert await ends.reader.readexactly(1) == b"b"


async def test_delay_and_throttle_take_their_time() -> None:
    clock = asyncio.get_running_loop().time
    async with connected() as (ends, _):
        ends.link.there.delay_s = ends.link.back.delay_s = 0.1
        started_s = clock()
        await ends.echo(b"late")
        assert clock() - started_s >= 0.2
        ends.link.there.delay_s = ends.link.back.delay_s = 0.0
        ends.link.back.bytes_per_s = 10_000
        started_s = clock()
        await ends.echo(bytes(2_000))
        assert clock() - started_s >= 0.2


async def test_flips_turn_one_bit_over() -> None:
    async with connected() as (ends, _):
        ends.link.back.change = flips(1.0, Random(0))
        got = await ends.echo(bytes(1000))
        assert sum(byte.bit_count() for byte in got) == 1
        ends.link.back.change = flips(0.0, Random(0))
        assert await ends.echo(bytes(1000)) == bytes(1000)


async def test_cut_resets_even_what_is_silent_and_mend_listens_again() -> None:
    async with connected() as (ends, _):
        ends.link.silence()
        assert await ends.nothing_comes(b"a")
        await ends.link.cut()
        async with asyncio.timeout(DEADLINE_S):
            with pytest.raises(ConnectionError):
                await ends.reader.readexactly(1)
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", ends.link.port)
        ends.link.flow()
        await ends.link.mend()
        reader, writer = await asyncio.open_connection("127.0.0.1", ends.link.port)
        assert await Ends(ends.link, reader, writer).echo(b"again") == b"again"
        writer.close()
