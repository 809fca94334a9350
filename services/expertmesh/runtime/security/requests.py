"""Requests are decoded here, for all services: what a message would take in memory is checked
before protobuf makes it.
"""

import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc

from expertmesh.runtime.wire import decode_whole


class RequestInterceptor(grpc.aio.ServerInterceptor):
    """Decodes the requests of calls with one request; a service that takes bytes gets bytes."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or not handler.request_deserializer:
            return handler
        # generated code gives the class's own FromString
        message_type = getattr(handler.request_deserializer, "__self__", None)
        if message_type is None:
            return handler
        kind = "unary_stream" if handler.response_streaming else "unary_unary"
        behavior = _decoding(getattr(handler, kind), message_type)
        return handler._replace(request_deserializer=None, **{kind: behavior})


def _decoding(behavior: Callable[..., Any], message_type: type[Any]) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(behavior):

        async def streaming(data: bytes, context: Any) -> AsyncIterator[Any]:
            # closed with this one: what a caller who left had asked for ends at once
            async with aclosing(behavior(decode_whole(message_type, data), context)) as responses:
                async for response in responses:
                    yield response

        return streaming

    async def unary(data: bytes, context: Any) -> Any:
        return await behavior(decode_whole(message_type, data), context)

    return unary
