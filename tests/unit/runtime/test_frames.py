"""Messages over a Unix socket arrive whole, in order and once, whatever their size; a peer that
goes or sends nonsense ends the connection."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.waiting import until

from expertmesh.runtime import frames
from expertmesh.runtime.errors import MalformedMessage, MessageTooLarge
from expertmesh.runtime.frames import FrameSocket

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract names are Linux's")
MOST_BYTES = 1 << 20


@dataclass
class End:
    """What one end of a connection has seen."""

    messages: list[bytes] = field(default_factory=list)
    ends: list[BaseException | None] = field(default_factory=list)

    def on(self, sock: socket.socket, *, patient: bool = False) -> FrameSocket:
        """This end of the connection."""
        sock.setblocking(False)

        def keep(message: object) -> None:
            self.messages.append(bytes(message))  # type: ignore[call-overload]

        return FrameSocket(sock, MOST_BYTES, keep, self.ends.append, patient=patient)


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[FrameSocket, End, FrameSocket, End]]:
    a, b = socket.socketpair(socket.AF_UNIX)
    here, there = End(), End()
    left, right = here.on(a), there.on(b, patient=True)
    yield left, here, right, there
    left.close()
    right.close()


SIZES = st.one_of(
    st.integers(0, 200),
    st.integers(65_500, 65_560),  # about the scratch memory
    st.integers(100_000, 300_000),
)


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(SIZES, min_size=1, max_size=3), min_size=1, max_size=12))
def test_messages_of_any_size_arrive_whole_and_in_order(sent: list[list[int]]) -> None:
    async def run() -> None:
        async with connected() as (left, here, right, there):
            messages = [[os.urandom(size) for size in sizes] for sizes in sent]
            for parts in messages:
                left.send(*parts)
                right.send(*parts)
            whole = [b"".join(parts) for parts in messages]
            await until(lambda: len(there.messages) == len(here.messages) == len(whole))
            assert there.messages == here.messages == whole

    asyncio.run(run())


async def test_a_slow_peer_is_waited_for_and_flushed() -> None:
    a, b = socket.socketpair(socket.AF_UNIX)
    here = End()
    server = here.on(a, patient=True)
    b.setblocking(False)
    server.send(bytes(MOST_BYTES))
    await asyncio.get_running_loop().sock_sendall(b, b"\1\0\0\0x")
    await asyncio.sleep(0.02)
    assert here.messages == [], "nothing is read while the peer reads nothing"
    there = End()
    client = there.on(b)
    await server.flush()
    await until(lambda: [len(m) for m in there.messages] == [MOST_BYTES])
    await until(lambda: here.messages == [b"x"])
    client.close()
    await until(lambda: here.ends == [None])


async def test_the_end_is_told_once_and_sending_afterwards_is_nothing() -> None:
    async with connected() as (left, here, right, there):
        left.close()
        left.close()
        left.send(b"late")
        await until(lambda: there.ends == [None])
        assert here.ends == [None]
        assert right.closed
        await right.flush()


async def test_a_peer_that_is_gone_while_we_send_is_noticed() -> None:
    async with connected() as (left, here, right, _):
        right._sock.shutdown(socket.SHUT_RDWR)
        for _ in range(3):
            left.send(bytes(1000))
        await until(lambda: len(here.ends) == 1)
        assert left.closed


async def test_a_message_that_is_too_large_ends_the_connection() -> None:
    a, b = socket.socketpair(socket.AF_UNIX)
    here = End()
    here.on(a)
    b.sendall((MOST_BYTES + 1).to_bytes(4, "little"))
    await until(lambda: bool(here.ends))
    assert type(here.ends[0]) is MessageTooLarge
    assert "1048577 bytes is above max_message_bytes 1048576" in str(here.ends[0])


async def test_a_refused_message_ends_the_connection() -> None:
    a, b = socket.socketpair(socket.AF_UNIX)
    a.setblocking(False)
    ends: list[BaseException | None] = []

    def refuse(message: object) -> None:
        raise MalformedMessage("not one of ours")

    FrameSocket(a, MOST_BYTES, refuse, ends.append)
    b.sendall(b"\1\0\0\0x\1\0\0\0y")
    await until(lambda: [type(end) for end in ends] == [MalformedMessage])


async def test_who_listens_can_be_dialled_and_nobody_else() -> None:
    name = f"expertmesh-test-{os.getpid()}"
    assert frames.dial(name) is None
    with frames.listen(name) as listener:
        sock = frames.dial(name)
        assert sock is not None
        accepted, _ = listener.accept()
        assert frames.is_same_user(accepted)
        assert frames.is_same_user(sock)
        sock.close()
        accepted.close()
        with pytest.raises(OSError, match="in use"):
            frames.listen(name)
    assert frames.dial(name) is None


async def test_another_user_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"expertmesh-test-{os.getpid()}"
    with frames.listen(name):
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        assert frames.dial(name) is None
