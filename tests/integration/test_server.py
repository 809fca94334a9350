"""The server every process runs: health, reflection, typed errors over the wire, graceful stop."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status
from tests.mesh import MakeCheckpoint, Mesh

from expertmesh.client.failures import error_of
from expertmesh.runtime import errors
from expertmesh.runtime.error_status import from_status
from expertmesh.runtime.server import MeshServer, running
from expertmesh.v1 import generate_pb2, generate_pb2_grpc, router_pb2, router_pb2_grpc

ROUTER = "expertmesh.v1.RouterService"
GENERATE = "expertmesh.v1.GenerateService"
ALWAYS = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

Behaviour = Callable[[], Awaitable[None]]


async def nothing() -> None:
    pass


class Servicer:
    """ListModels and Generate do what the test says before they answer; Generate answers once
    before it, too."""

    def __init__(self) -> None:
        self.before: Behaviour = nothing

    async def ListModels(self, request: Any, context: Any) -> router_pb2.ListModelsResponse:
        await self.before()
        return router_pb2.ListModelsResponse()

    async def Generate(
        self, request: generate_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[generate_pb2.GenerateResponse]:
        yield generate_pb2.GenerateResponse(text="first")
        await self.before()
        yield generate_pb2.GenerateResponse(text="second")

    def raises(self, error: Exception) -> None:
        async def fail() -> None:
            raise error

        self.before = fail

    def add_to(self, server: Any) -> None:
        models = grpc.unary_unary_rpc_method_handler(
            self.ListModels,
            router_pb2.ListModelsRequest.FromString,
            router_pb2.ListModelsResponse.SerializeToString,
        )
        generate = grpc.unary_stream_rpc_method_handler(
            self.Generate,
            generate_pb2.GenerateRequest.FromString,
            generate_pb2.GenerateResponse.SerializeToString,
        )
        handlers: dict[str, Any] = {
            ROUTER: {"ListModels": models},
            GENERATE: {"Generate": generate},
        }
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(name, own) for name, own in handlers.items()]
        )


class Running:
    """A server with both services and a client of it."""

    def __init__(self, server: MeshServer, servicer: Servicer, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.servicer = servicer
        self.router = router_pb2_grpc.RouterServiceStub(channel)
        self.generate = generate_pb2_grpc.GenerateServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    async def list_models(self, **options: Any) -> router_pb2.ListModelsResponse:
        return await self.router.ListModels(router_pb2.ListModelsRequest(), **options)

    async def status(self, service: str = "") -> int:
        answer: Any = await self.health.Check(health_pb2.HealthCheckRequest(service=service))
        return int(answer.status)


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Running]:
    servicer = Servicer()
    server = MeshServer([ROUTER, GENERATE], servicer.add_to, **options)
    async with (
        running(server, "127.0.0.1") as target,
        grpc.aio.insecure_channel(target) as channel,
    ):
        yield Running(server, servicer, channel)


async def failure(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_health_tells_whether_calls_are_welcome() -> None:
    async with serving() as up:
        for service in ("", ROUTER, GENERATE):
            assert await up.status(service) == SERVING
        await up.server.set_not_serving()
        for service in ("", ROUTER, GENERATE):
            assert await up.status(service) == NOT_SERVING
        await up.list_models()  # running calls and late ones still get their answer
        await up.server.set_serving()
        assert await up.status() == SERVING
        assert (await failure(up.status("no.Such"))).code() == grpc.StatusCode.NOT_FOUND


async def test_health_watchers_hear_of_the_stop() -> None:
    async with serving() as up:
        watch: Any = up.health.Watch(health_pb2.HealthCheckRequest(service=ROUTER))
        assert (await watch.read()).status == SERVING
        stopping = asyncio.create_task(up.server.stop(5.0))
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()
        await stopping


async def test_a_server_can_start_not_serving() -> None:
    server = MeshServer([ROUTER], Servicer().add_to)
    port = await server.start("127.0.0.1", serving=False)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert (await check).status == NOT_SERVING
    await server.stop(0)


def reflected(target: str) -> set[str]:
    """Services a stock client finds at a target; every one of them can be described."""
    with grpc.insecure_channel(target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        names = set(database.get_services())
        for name in names:
            database.FindFileContainingSymbol(name)
        return names


async def test_reflection_lists_every_service_of_every_server(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    replica, router = await mesh.replica(path), await mesh.router(path)
    at_replica = await asyncio.to_thread(reflected, replica.address)
    at_router = await asyncio.to_thread(reflected, router.target)
    own = {"expertmesh.v1.ExpertService", "expertmesh.v1.PlacementService"}
    assert at_replica == ALWAYS | own
    assert at_router == ALWAYS | {ROUTER, "expertmesh.v1.ControlService"}


RAISED = [
    errors.InvalidInput.of("hidden.dtype", expected="bfloat16", got="float32", hint="Cast it."),
    errors.UnknownExpert("layer 3, expert 9: ids are 0 to 7", layer=3, expert=9),
    errors.QueueFull("full", queued_rows=8),
    errors.DeadlineExceeded("too late"),
    errors.ExpertUnavailable("nobody", layer=1, expert=2),
    errors.UnsupportedCheckpoint("what is that", model_type="odd"),
    errors.InternalError("a bug we know"),
]


@pytest.mark.parametrize("raised", RAISED, ids=lambda error: error.reason())
async def test_an_error_arrives_with_its_code_text_and_details(
    raised: errors.ExpertMeshError,
) -> None:
    async with serving() as up:
        up.servicer.raises(raised)
        failed = await failure(up.list_models())
        assert (failed.code(), failed.details()) == (raised.code, raised.message)
        status = rpc_status.from_call(failed)
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info)
        assert (info.domain, info.reason) == ("expertmesh", raised.reason())
        assert dict(info.metadata) == raised.fields
        again = from_status(status)
        assert (type(again), again.message, again.fields) == (
            type(raised),
            raised.message,
            raised.fields,
        )
        up.servicer.before = nothing
        await up.list_models()


async def test_a_stream_fails_after_what_it_has_sent() -> None:
    async with serving() as up:
        up.servicer.raises(errors.Draining("going home"))
        call: Any = up.generate.Generate(generate_pb2.GenerateRequest())
        assert (await call.read()).text == "first"
        failed = await failure(call.read())
        assert isinstance(from_status(rpc_status.from_call(failed)), errors.Draining)


async def test_an_unexpected_exception_keeps_its_text_to_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving() as up:
        up.servicer.raises(KeyError("the password"))
        call = up.generate.Generate(generate_pb2.GenerateRequest())
        await call.read()
        for failed in (await failure(up.list_models()), await failure(call.read())):
            assert failed.code() == grpc.StatusCode.INTERNAL
            seen = f"{failed.details()} {failed.trailing_metadata()} {failed.debug_error_string()}"
            assert "password" not in seen
            status = rpc_status.from_call(failed)
            assert isinstance(from_status(status), errors.InternalError)
        logged = [record for record in caplog.records if record.exc_info]
        assert len(logged) == 2
        assert all("password" in str(record.exc_info) for record in logged)
        assert {record.levelno for record in logged} == {logging.ERROR}
        up.servicer.before = nothing
        await up.list_models()


async def test_an_unknown_method_is_said_to_be_one() -> None:
    async with serving() as up:
        failed = await failure(up.router.Forward(router_pb2.ForwardRequest()))
        assert failed.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_taken_port_is_a_config_error_that_names_it() -> None:
    async with serving() as up:
        second = MeshServer([ROUTER], Servicer().add_to)
        with pytest.raises(errors.ConfigError, match=f"127.0.0.1:{up.server.port}") as caught:
            await second.start("127.0.0.1", up.server.port)
        assert caught.value.fields["field"] == "port"
        await up.list_models()
    await second.stop(0)


async def test_a_stop_lets_running_calls_finish_and_refuses_new_ones() -> None:
    async with serving() as up:
        entered, finish = asyncio.Event(), asyncio.Event()

        async def wait() -> None:
            entered.set()
            await finish.wait()

        up.servicer.before = wait
        call = asyncio.ensure_future(up.list_models())
        await entered.wait()
        stopping = asyncio.create_task(up.server.stop(30.0))
        late = await failure(refused(up))
        assert isinstance(error_of(late), errors.Unavailable)  # by gRPC's timing also CANCELLED
        assert not call.done()
        finish.set()
        assert await call == router_pb2.ListModelsResponse()
        await asyncio.wait_for(stopping, 5)


async def refused(up: Running) -> None:
    """Calls until one is refused: the stop starts when the loop gets to it."""
    up.servicer.before = nothing
    while True:
        await up.list_models(timeout=5)


async def test_calls_that_outlast_the_grace_are_cut() -> None:
    async with serving() as up:
        entered = asyncio.Event()

        async def wait() -> None:
            entered.set()
            await asyncio.Event().wait()

        up.servicer.before = wait
        call = asyncio.ensure_future(failure(up.list_models()))
        await entered.wait()
        await up.server.stop(0.05)
        assert isinstance(error_of(await call), errors.Unavailable)


async def test_a_message_above_the_limit_is_refused_and_the_next_one_is_not() -> None:
    async with serving(max_message_bytes=1 << 16) as up:
        large = generate_pb2.GenerateRequest(text="x" * (1 << 17))
        call: Any = up.generate.Generate(large)
        failed = await failure(call.read())
        assert failed.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(1 << 16) in (failed.details() or "")
        await up.list_models()
