"""Clients of GenerateService. Import neither torch nor Ray nor Redis."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc

from expertmesh.client.failures import error_of
from expertmesh.runtime.channels import channel_options
from expertmesh.v1 import generate_pb2, generate_pb2_grpc, router_pb2

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Chunk:
    """What is new since the last chunk."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    """"length", "eos" or "stop" in the last chunk, else ""."""
    prompt_tokens: int
    """In the last chunk."""
    generated_tokens: int
    """In the last chunk."""


def request_of(
    prompt: Prompt,
    *,
    model: str = "",
    max_new_tokens: int = 0,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> generate_pb2.GenerateRequest:
    """A GenerateRequest; greedy unless one of the sampling parameters is given."""
    drawn = (temperature, top_k, top_p, seed)
    sampling = generate_pb2.SamplingParams(
        do_sample=any(value is not None for value in drawn),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    request = generate_pb2.GenerateRequest(
        model=model,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop=stop,
        ignore_eos=ignore_eos,
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokens.ids.extend(prompt)
    return request


def _chunk(response: generate_pb2.GenerateResponse) -> Chunk:
    reason = generate_pb2.FinishReason.Name(response.finish_reason)
    name = reason.removeprefix("FINISH_REASON_").lower()
    return Chunk(
        response.text,
        tuple(response.tokens),
        "" if name == "unspecified" else name,
        response.prompt_tokens,
        response.generated_tokens,
    )


class Client:
    """A blocking client of one gateway.

    Args:
        target: "host:port".
    """

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, options=channel_options())
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
        model: str = "",
        max_new_tokens: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        timeout_s: float | None = None,
    ) -> Iterator[Chunk]:
        """Tokens and text as they come. Closing the iterator cancels the call and frees its slot.

        Raises:
            ExpertMeshError: as the gateway answered.
        """
        request = request_of(
            prompt,
            model=model,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
        )
        call = self._stub.Generate(request, timeout=timeout_s, metadata=trace_metadata())
        try:
            for response in call:
                yield _chunk(response)
        except grpc.RpcError as failure:
            raise error_of(failure) from None
        finally:
            call.cancel()

    def models(self, timeout_s: float = 10.0) -> list[router_pb2.ModelInfo]:
        """The models the gateway serves."""
        try:
            reply = self._stub.ListModels(router_pb2.ListModelsRequest(), timeout=timeout_s)
        except grpc.RpcError as failure:
            raise error_of(failure) from None
        return list(reply.models)


class AsyncClient:
    """An asyncio client of one gateway.

    Args:
        target: "host:port".
    """

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target, options=channel_options())
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
        self, request: generate_pb2.GenerateRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """Tokens and text as they come, for a request made with `request_of`.

        Raises:
            ExpertMeshError: as the gateway answered.
        """
        call = self._stub.Generate(request, timeout=timeout_s, metadata=trace_metadata())
        try:
            async for response in call:
                yield _chunk(response)
        except grpc.RpcError as failure:
            raise error_of(failure) from None
        finally:
            call.cancel()


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """W3C trace context of the caller's current span, so that its trace goes on in the mesh."""
    from opentelemetry.propagate import inject

    carrier: dict[str, str] = {}
    inject(carrier)
    return tuple(carrier.items())
