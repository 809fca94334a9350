"""Connections that age out: calls and streams end well, and new servers get their share.

A forwarder of TCP connections stands for a Service of Kubernetes, which chooses a Pod for each
connection and not for each call.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from expertmesh.runtime.channels import connect
from expertmesh.runtime.connection_age import ConnectionAge
from expertmesh.runtime.server import MeshServer, running

SERVICE = "expertmesh.v1.GenerateService"
HOST = "127.0.0.1"
AGE = ConnectionAge(max_connection_age_s=0.2)


class Servicer:
    """Answers with its name: once, or for as long as the caller lets it."""

    def __init__(self, name: str) -> None:
        self.name = name.encode()
        self.connections: set[str] = set()

    async def once(self, request: bytes, context: Any) -> bytes:
        self.connections.add(context.peer())
        return self.name

    async def on_and_on(self, request: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for _ in request:
            yield self.name

    def add_to(self, server: Any) -> None:
        handlers: dict[str, Any] = {
            "Once": grpc.unary_unary_rpc_method_handler(self.once),
            "OnAndOn": grpc.stream_stream_rpc_method_handler(self.on_and_on),
        }
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        server.add_generic_rpc_handlers((generic,))


@asynccontextmanager
async def served(name: str, age: ConnectionAge) -> AsyncIterator[tuple[Servicer, str]]:
    servicer = Servicer(name)
    server = MeshServer([SERVICE], servicer.add_to, connection_age=age)
    async with running(server, HOST) as target:
        yield servicer, target


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until one side ends."""
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def service(targets: Sequence[str]) -> AsyncIterator[str]:
    """New connections go to the newest target."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = targets[-1].rpartition(":")
        to_reader, to_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(forward(reader, to_writer), forward(to_reader, writer))

    server = await asyncio.start_server(accept, HOST)
    try:
        yield f"{HOST}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_calls_move_to_a_new_server_and_none_fails() -> None:
    async with served("old", AGE) as (_, old), served("new", AGE) as (_, new):
        targets = [old]
        async with service(targets) as target, connect(target) as channel:
            once: Any = channel.unary_unary(f"/{SERVICE}/Once")
            assert await once(b"") == b"old"
            targets.append(new)
            async with asyncio.timeout(20):
                while await once(b"") == b"old":
                    pass


async def test_callers_side_by_side_do_not_notice() -> None:
    async with served("it", AGE) as (servicer, target), connect(target) as channel:
        once: Any = channel.unary_unary(f"/{SERVICE}/Once")

        async def call() -> int:
            num_calls = 0
            while len(servicer.connections) < 8:
                assert await once(b"") == b"it"
                num_calls += 1
            return num_calls

        async with asyncio.timeout(30):
            num_calls = await asyncio.gather(*(call() for _ in range(8)))
        assert min(num_calls) > 0


async def test_a_stream_outlives_its_connections_age() -> None:
    async with served("it", AGE) as (servicer, target), connect(target) as channel:
        once: Any = channel.unary_unary(f"/{SERVICE}/Once")
        stream: Any = channel.stream_stream(f"/{SERVICE}/OnAndOn")()
        async with asyncio.timeout(30):
            while len(servicer.connections) < 4:
                await stream.write(b"")
                assert await stream.read() == b"it"
                await once(b"")
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK


async def test_grace_ends_a_stream_that_will_not() -> None:
    age = ConnectionAge(max_connection_age_s=0.2, connection_grace_s=0.2)
    async with served("it", age) as (_, target), connect(target) as channel:
        stream: Any = channel.stream_stream(f"/{SERVICE}/OnAndOn")()
        await stream.write(b"")
        assert await stream.read() == b"it"
        async with asyncio.timeout(20):
            with pytest.raises(grpc.RpcError) as cut:
                await stream.read()
        assert cut.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_without_an_age_a_connection_stays() -> None:
    async with served("it", ConnectionAge()) as (servicer, target), connect(target) as channel:
        once: Any = channel.unary_unary(f"/{SERVICE}/Once")
        for _ in range(200):
            await once(b"")
        assert len(servicer.connections) == 1
