"""Who may call what. Decided from metadata and certificate alone, before a byte of the request is
read: whoever may not call costs no memory.
"""

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health

from expertmesh.runtime.errors import ExpertMeshError, PermissionDenied, Unauthenticated
from expertmesh.runtime.origin import authenticated_name
from expertmesh.runtime.security.access import host_of
from expertmesh.runtime.security.identity import check_peer, has_identity
from expertmesh.runtime.security.limits import CallMeters
from expertmesh.runtime.security.settings import CallLimits

_BEARER = "bearer "
_MAX_TOKEN_CHARS = 8192  # gRPC's bound on all metadata

AuthContext = Mapping[str, Sequence[bytes]]


@dataclass(frozen=True)
class Caller:
    """Who calls."""

    name: str
    scopes: frozenset[str] = frozenset()
    limits: CallLimits | None = None
    """Its own, instead of those for everybody."""


class Authenticator(Protocol):
    """Knows one kind of token."""

    async def caller_of(self, token: str) -> Caller | None:
        """Whose token it is; None if it is of another kind.

        Raises:
            Unauthenticated: of this kind, and not good (any more).
        """
        ...


class Guard(Protocol):
    """Decides about calls."""

    async def caller_of(self, service: str, context: Any) -> Caller | None:
        """Who calls; None is not counted against any limit.

        Raises:
            Unauthenticated, PermissionDenied: may not call this service.
        """
        ...

    def running(self, caller: Caller) -> Any:
        """A context manager around a call.

        Raises:
            RateLimited: too many calls.
        """
        ...


class ReplicaGuard:
    """Lets in who has the mesh's identity."""

    def __init__(self, mesh: str) -> None:
        self._mesh = mesh

    async def caller_of(self, service: str, context: Any) -> Caller | None:
        """See `Guard.caller_of`."""
        check_peer(context.auth_context(), self._mesh)
        return None

    def running(self, caller: Caller) -> Any:
        """Not used: replicas bound their queue."""
        raise AssertionError("replicas do not count callers")


class PublicGuard:
    """Of router and gateway: tokens with scopes, and limits.

    Args:
        scopes: service -> scope that a token needs; the others need any token.
        authenticators: asked in turn; none of them: everybody may call everything.
        mesh: processes with the identity of this mesh need no token and have no limits.
    """

    def __init__(
        self,
        scopes: Mapping[str, str],
        authenticators: Sequence[Authenticator],
        limits: CallLimits,
        mesh: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scopes = scopes
        self._authenticators = authenticators
        self._meters = CallMeters(limits)
        self._mesh = mesh
        self._clock = clock

    async def caller_of(self, service: str, context: Any) -> Caller | None:
        """See `Guard.caller_of`."""
        peer: AuthContext = context.auth_context()
        if has_identity(peer, self._mesh):
            return None
        if not self._authenticators:
            return Caller(_peer_name(peer, context.peer()))
        caller = await self._authenticated(_token(context.invocation_metadata()))
        needed = self._scopes.get(service)
        if needed is not None and needed not in caller.scopes:
            raise PermissionDenied(
                f"{caller.name}: the token lacks the scope {needed!r}, which {service} needs",
                caller=caller.name,
                scope=needed,
            )
        return caller

    async def _authenticated(self, token: str) -> Caller:
        for authenticator in self._authenticators:
            caller = await authenticator.caller_of(token)
            if caller is not None:
                return caller
        raise Unauthenticated("authorization: the token is not one that this server takes")

    def running(self, caller: Caller) -> Any:
        """See `Guard.running`."""
        return self._meters.running(caller.name, caller.limits, self._clock)


def _token(metadata: Any) -> str:
    """The bearer token of a call."""
    for key, value in metadata or ():
        if key == "authorization" and isinstance(value, str):
            is_bearer = value[: len(_BEARER)].lower() == _BEARER
            if is_bearer and value.isascii() and len(value) <= _MAX_TOKEN_CHARS:
                return value[len(_BEARER) :].strip()
            raise Unauthenticated("authorization: expected 'Bearer TOKEN', got something else")
    raise Unauthenticated("authorization: expected the metadata 'Bearer TOKEN', got none")


def _peer_name(auth_context: AuthContext, peer: str) -> str:
    """A name for whoever has no token: that in the certificate, else the address without port."""
    for kind in ("peer_uri", "peer_dns", "x509_common_name"):
        for name in auth_context.get(kind, ()):
            return name.decode("utf-8", "replace")
    return host_of(peer.partition(":")[2] or peer)


class GuardInterceptor(grpc.aio.ServerInterceptor):
    """Puts a guard before every service but the health check.

    Every call is served as a stream, whatever its kind, because gRPC reads the request of a unary
    call before it asks anybody. Requests stay bytes: `requests.py` decodes them.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler: Any = await continuation(handler_call_details)
        service = handler_call_details.method.strip("/").rpartition("/")[0]
        if handler is None or service == health.SERVICE_NAME:
            return handler

        async def guarded(requests: AsyncIterator[Any], context: Any) -> None:
            caller = await self._guard.caller_of(service, context)
            if caller is None:
                await _serve(handler, requests, context)
                return
            authenticated_name.set(caller.name)  # of this call's own task
            with self._guard.running(caller):
                await _serve(handler, requests, context)

        return grpc.stream_stream_rpc_method_handler(
            guarded, handler.request_deserializer, handler.response_serializer
        )


async def _serve(handler: Any, requests: AsyncIterator[Any], context: Any) -> None:
    """Run a handler of any kind on the streams of a call."""
    request: Any = requests
    if not handler.request_streaming:
        request = await context.read()
        if request is grpc.aio.EOF:
            raise ExpertMeshError("the caller left before its request")
    kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
    behavior = next(found for kind in kinds if (found := getattr(handler, kind)))
    answer = behavior(request, context)
    if hasattr(answer, "__aiter__"):
        async with aclosing(answer):
            async for response in answer:
                await context.write(response)
        return
    response = await answer
    if not handler.response_streaming:
        await context.write(response)
