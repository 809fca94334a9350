"""The gRPC server every process runs: health, reflection, typed errors, graceful stop."""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.rpc import status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from expertmesh.runtime.channels import DEFAULT_MAX_MESSAGE_BYTES, NO_RETRY, server_options
from expertmesh.runtime.connection_age import ConnectionAge
from expertmesh.runtime.errors import (
    ConfigError,
    ExpertMeshError,
    ExpertUnavailable,
    InternalError,
)
from expertmesh.runtime.security.guard import GuardInterceptor
from expertmesh.runtime.security.requests import RequestInterceptor
from expertmesh.runtime.security.server import ServerSecurity

logger = logging.getLogger(__name__)

LIVENESS = "liveness"
"""What a health check asks for to learn whether the process answers at all, whoever is missing."""

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


def status_of(error: BaseException) -> status_pb2.Status:
    """What a caller sees: an ExpertMeshError as it is, anything else as INTERNAL without text."""
    if isinstance(error, ExpertMeshError):
        return error.to_status()
    logger.error("unexpected error, answered as INTERNAL", exc_info=error)
    return InternalError("internal error; the cause is in the log of the server").to_status()


async def _abort(error: Exception, context: Any, *, is_final: bool) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    status = rpc_status.to_status(status_of(error))
    if is_final and isinstance(error, ExpertUnavailable):
        status = status._replace(trailing_metadata=(*status.trailing_metadata, NO_RETRY))
    await context.abort_with_status(status)


def _guard_unary(
    behavior: Callable[..., Awaitable[Any]], is_serving: Callable[[], bool]
) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await behavior(request, context)
        except Exception as error:
            return await _abort(error, context, is_final=is_serving())

    return guarded


def _guard_stream(
    behavior: Callable[..., Any], is_serving: Callable[[], bool]
) -> Callable[..., Any]:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for response in behavior(request, context):
                yield response
        except Exception as error:
            await _abort(error, context, is_final=is_serving())

    return guarded


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns raised ExpertMeshErrors into statuses with details; see errors.py for the mapping.

    Args:
        is_serving: while it says no, clients may ask another server for what is unavailable here;
            then they would hear the same there, only later.
    """

    def __init__(self, is_serving: Callable[[], bool] = lambda: True) -> None:
        self._is_serving = is_serving

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            behavior = getattr(handler, kind)
            if behavior is not None:
                guard = _guard_stream if inspect.isasyncgenfunction(behavior) else _guard_unary
                return handler._replace(**{kind: guard(behavior, self._is_serving)})
        return handler


class MeshServer:
    """A grpc.aio server with health and reflection.

    Args:
        services: full names of the services added by `add`, for reflection and health.
        add: adds the servicers to the server.
        max_request_bytes: of one request, if it is less than `max_message_bytes`.
        security: certificate and guard; the default is plaintext for everybody, on loopback.
        connection_age: when clients are to connect anew; the default is never.
    """

    def __init__(
        self,
        services: Sequence[str],
        add: Callable[[grpc.aio.Server], None],
        *,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        max_request_bytes: int | None = None,
        security: ServerSecurity | None = None,
        connection_age: ConnectionAge | None = None,
    ) -> None:
        self._services = services
        self._is_serving = False
        self._security = security or ServerSecurity()
        guard = self._security.guard
        self._server = grpc.aio.server(
            options=[
                *server_options(max_message_bytes, max_request_bytes),
                *(connection_age or ConnectionAge()).options(),
            ],
            interceptors=[
                ErrorInterceptor(lambda: self._is_serving),
                *([GuardInterceptor(guard)] if guard else []),
                RequestInterceptor(),
            ],
        )
        self._health = health.aio.HealthServicer()
        add(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.port = 0

    async def start(self, host: str, port: int = 0, *, serving: bool = True) -> int:
        """Listen on host:port (0 picks a free port). Returns the port.

        Args:
            serving: whether health checks say SERVING from the start.

        Raises:
            ConfigError: the address cannot be bound, or `security` does not let it.
        """
        try:
            self.port = self._security.listen(self._server, host, port)
        except RuntimeError as error:
            message = f"cannot listen on {host}:{port}; is another process using the port?"
            raise ConfigError(message, field="port", address=f"{host}:{port}") from error
        await self._server.start()
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        await (self.set_serving() if serving else self.set_not_serving())
        return self.port

    async def _set_health(self, status: Any) -> None:
        self._is_serving = status == health_pb2.HealthCheckResponse.SERVING
        for name in ("", *self._services):
            await self._health.set(name, status)

    async def set_serving(self) -> None:
        """Tell health checkers that calls are welcome."""
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def set_not_serving(self) -> None:
        """Tell health checkers to stop sending work; running calls go on."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running ones finish for at most `grace_s`, then cut them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def wait(self) -> None:
        """Until stopped."""
        await self._server.wait_for_termination()


@asynccontextmanager
async def running(
    server: MeshServer, host: str, port: int = 0, *, grace_s: float = 5.0
) -> AsyncIterator[str]:
    """Run `server` inside the block; yields its "host:port"."""
    try:
        yield f"{host}:{await server.start(host, port)}"
    finally:
        await asyncio.shield(server.stop(grace_s))
