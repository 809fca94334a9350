"""The client's service config, against real servers: several routers behind one target."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from expertmesh.client.failures import error_of
from expertmesh.runtime.channels import channel_options
from expertmesh.runtime.errors import Draining, ExpertMeshError, ExpertUnavailable, QueueFull
from expertmesh.runtime.server import MeshServer, running
from expertmesh.v1 import router_pb2, router_pb2_grpc

SERVICE = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name
Fails = Callable[[int], ExpertMeshError | None]
"""The error that a server's n-th call gets, from 1."""


class _Router:
    """Answers Dispatch with what it got."""

    server: MeshServer

    def __init__(self, fails: Fails) -> None:
        self.num_calls = 0
        self._fails = fails

    async def dispatch(self, request: Any, context: Any) -> Any:
        self.num_calls += 1
        if error := self._fails(self.num_calls):
            raise error
        return router_pb2.DispatchResponse(hidden=request.hidden)


@asynccontextmanager
async def router(fails: Fails = lambda number: None) -> AsyncIterator[tuple[_Router, str]]:
    servicer = _Router(fails)

    def add(server: Any) -> None:
        handler: Any = grpc.unary_unary_rpc_method_handler(
            servicer.dispatch,
            request_deserializer=router_pb2.DispatchRequest.FromString,
            response_serializer=router_pb2.DispatchResponse.SerializeToString,
        )
        handlers = grpc.method_handlers_generic_handler(SERVICE, {"Dispatch": handler})
        server.add_generic_rpc_handlers((handlers,))

    servicer.server = MeshServer([SERVICE], add)
    async with running(servicer.server, "127.0.0.1", grace_s=0) as address:
        yield servicer, address


async def dispatch(*addresses: str, num_bytes: int = 8) -> router_pb2.DispatchResponse:
    request = router_pb2.DispatchRequest()
    request.hidden.data = bytes(num_bytes)
    target = f"ipv4:{','.join(addresses)}"
    async with grpc.aio.insecure_channel(target, options=channel_options()) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        return await stub.Dispatch(request, timeout=10)


@pytest.mark.parametrize("num_bytes", [8, 1 << 20])
async def test_a_draining_router_is_asked_again(num_bytes: int) -> None:
    async with router(lambda number: Draining("soon") if number == 1 else None) as (servicer, own):
        answer = await dispatch(own, num_bytes=num_bytes)
    assert len(answer.hidden.data) == num_bytes
    assert servicer.num_calls == 2


async def test_calls_go_past_a_router_that_is_gone() -> None:
    async with router() as (_, gone):
        pass
    async with router() as (servicer, lives):
        for _ in range(4):
            await dispatch(gone, lives)
    assert servicer.num_calls == 4


async def test_two_routers_get_their_turns() -> None:
    async with router() as (one, first), router() as (other, second):
        target = f"ipv4:{first},{second}"
        async with grpc.aio.insecure_channel(target, options=channel_options()) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            while not (one.num_calls and other.num_calls):
                await stub.Dispatch(router_pb2.DispatchRequest(), timeout=10)


@pytest.mark.parametrize("error", [ExpertUnavailable("none", layer=1, expert=2), QueueFull("full")])
async def test_what_another_router_would_say_as_well_is_said_once(error: ExpertMeshError) -> None:
    async with router(lambda number: error) as (servicer, address):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await dispatch(address)
    assert servicer.num_calls == 1
    got = error_of(caught.value)
    assert (type(got), got.fields) == (type(error), error.fields)


async def test_a_router_that_does_not_serve_yet_is_passed_over() -> None:
    error = ExpertUnavailable("nothing heard yet", layer=0, expert=0)
    async with router(lambda number: error if number == 1 else None) as (servicer, address):
        await servicer.server.set_not_serving()
        await dispatch(address)
    assert servicer.num_calls == 2
