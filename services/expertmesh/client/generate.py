"""Clients of GenerateService. Import neither torch nor Ray nor Redis."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from types import TracebackType
from typing import Self, TypedDict, Unpack

import grpc

from expertmesh.client.course import Chunk, Course
from expertmesh.client.failures import error_of
from expertmesh.runtime.channels import connect, connect_blocking
from expertmesh.runtime.missing_experts import to_proto
from expertmesh.runtime.security.access import PLAIN, Access, Metadata
from expertmesh.v1 import generate_pb2, generate_pb2_grpc, priority_pb2, router_pb2

Prompt = str | Sequence[int]


class Wanted(TypedDict, total=False):
    """What may be asked for beside the prompt. What is left out is as the model's own
    generation_config and the gateway's settings say, and greedy without sampling parameters."""

    model: str
    """"" is the only one served."""
    max_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    """Honoured by the engine "exact"."""
    stop: Sequence[str]
    """Generation ends before the first of these."""
    ignore_eos: bool
    missing_experts: str | None
    """"strict", "substitute" or "renormalise"; None: as the gateway's settings."""
    selection: router_pb2.SelectionOptions | None
    """How far the experts may be from the gate's choice; None: as configured."""
    batch: bool
    """Nobody waits for it: run it after interactive requests."""


def request_of(prompt: Prompt, **wanted: Unpack[Wanted]) -> generate_pb2.GenerateRequest:
    """A GenerateRequest.

    Raises:
        InvalidInput: there is no such policy for missing experts.
    """
    drawn = {name: wanted.get(name) for name in ("temperature", "top_k", "top_p", "seed")}
    do_sample = any(value is not None for value in drawn.values())
    is_batch = wanted.get("batch", False)
    request = generate_pb2.GenerateRequest(
        model=wanted.get("model", ""),
        sampling=generate_pb2.SamplingParams(do_sample=do_sample, **drawn),  # type: ignore[arg-type]
        max_new_tokens=wanted.get("max_new_tokens", 0),
        stop=wanted.get("stop", ()),
        ignore_eos=wanted.get("ignore_eos", False),
        missing_experts=to_proto(wanted.get("missing_experts")),
        selection=wanted.get("selection"),
        priority=priority_pb2.PRIORITY_BATCH if is_batch else priority_pb2.PRIORITY_UNSPECIFIED,
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokens.ids.extend(prompt)
    return request


class Client:
    """A blocking client of one gateway.

    Args:
        target: "host:port".
        access: certificates and token; the default is plaintext without a token.
    """

    def __init__(self, target: str, access: Access = PLAIN) -> None:
        self._access = access
        self._channel = connect_blocking(target, access)
        self._stub = generate_pb2_grpc.GenerateServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        retries: int = 0,
        **wanted: Unpack[Wanted],
    ) -> Iterator[Chunk]:
        """Tokens and text as they come. Closing the iterator cancels the call and frees its slot.

        An answer that breaks off because its gateway is lost goes on at another (`Course`).

        Args:
            timeout_s: for everything, pauses included.
            retries: how often a request that was not begun is tried again, when the gateway says.
            wanted: see `Wanted`.

        Raises:
            ExpertMeshError: as the gateway answered.
        """
        course = Course(request_of(prompt, **wanted), retries, timeout_s)
        while not course.is_over:
            metadata = call_metadata(self._access)
            call = self._stub.Generate(course.request, timeout=course.left_s(), metadata=metadata)
            try:
                for response in call:
                    yield course.take(response)
                return
            except grpc.RpcError as failure:
                error = error_of(failure)
            finally:
                call.cancel()
            time.sleep(course.pause_s(error))

    def models(self, timeout_s: float = 10.0) -> list[router_pb2.ModelInfo]:
        """The models the gateway serves."""
        try:
            reply = self._stub.ListModels(
                router_pb2.ListModelsRequest(),
                timeout=timeout_s,
                metadata=self._access.metadata(),
            )
        except grpc.RpcError as failure:
            raise error_of(failure) from None
        return list(reply.models)


class AsyncClient:
    """An asyncio client of one gateway.

    Args:
        target: "host:port".
        access: certificates and token; the default is plaintext without a token.
    """

    def __init__(self, target: str, access: Access = PLAIN) -> None:
        self._access = access
        self._channel = connect(target, access=access)
        self._stub = generate_pb2_grpc.GenerateServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def generate(
        self,
        request: generate_pb2.GenerateRequest,
        timeout_s: float | None = None,
        retries: int = 0,
    ) -> AsyncGenerator[Chunk, None]:
        """As `Client.generate`, for a request made with `request_of`.

        Args:
            timeout_s: for everything, pauses included.
            retries: how often a request that was not begun is tried again, when the gateway says.

        Raises:
            ExpertMeshError: as the gateway answered.
        """
        course = Course(request, retries, timeout_s)
        while not course.is_over:
            metadata = call_metadata(self._access)
            call = self._stub.Generate(course.request, timeout=course.left_s(), metadata=metadata)
            try:
                async for response in call:
                    yield course.take(response)
                return
            except grpc.RpcError as failure:
                error = error_of(failure)
            finally:
                call.cancel()
            await asyncio.sleep(course.pause_s(error))


def call_metadata(access: Access) -> Metadata:
    """The token, and the W3C trace context of the caller's current span, whose trace goes on in the
    mesh."""
    from opentelemetry.propagate import inject

    carrier: dict[str, str] = {}
    inject(carrier)
    return (*access.metadata(), *carrier.items())
