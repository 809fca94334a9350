"""Clients of GenerateService. Import neither torch nor Ray nor Redis."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc

from expertmesh.client.failures import error_of
from expertmesh.client.retries import Patience
from expertmesh.runtime.channels import connect, connect_blocking
from expertmesh.runtime.missing_experts import to_proto
from expertmesh.runtime.security.access import PLAIN, Access, Metadata
from expertmesh.v1 import generate_pb2, generate_pb2_grpc, priority_pb2, router_pb2

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
    degraded_mass: float = 0.0
    """What missing experts have cost so far: the largest share of a token's weights in a layer that
    was for experts without a live replica; 0 if everything is exact."""
    mean_degraded_mass: float = 0.0
    """The mean over all tokens and layers so far, the prompt's included."""


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
    missing_experts: str | None = None,
    selection: router_pb2.SelectionOptions | None = None,
    batch: bool = False,
) -> generate_pb2.GenerateRequest:
    """A GenerateRequest; greedy unless one of the sampling parameters is given.

    Args:
        missing_experts: "strict", "substitute" or "renormalise"; None: as the gateway's settings.
        selection: how far the experts may be from the gate's choice; None: as configured.
        batch: nobody waits for it: run it after interactive requests.

    Raises:
        InvalidInput: there is no such policy.
    """
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
        missing_experts=to_proto(missing_experts),
        selection=selection,
        priority=priority_pb2.PRIORITY_BATCH if batch else priority_pb2.PRIORITY_UNSPECIFIED,
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
        response.degraded_mass.largest,
        response.degraded_mass.mean,
    )


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
        model: str = "",
        max_new_tokens: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        missing_experts: str | None = None,
        selection: router_pb2.SelectionOptions | None = None,
        batch: bool = False,
        timeout_s: float | None = None,
        retries: int = 0,
    ) -> Iterator[Chunk]:
        """Tokens and text as they come. Closing the iterator cancels the call and frees its slot.

        Args:
            missing_experts, selection: as for `request_of`.
            batch: nobody waits for it: run it after interactive requests.
            timeout_s: for everything, pauses included.
            retries: how often a request that was not begun is tried again, when the gateway says.

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
            missing_experts=missing_experts,
            selection=selection,
            batch=batch,
        )
        patience = Patience(retries, timeout_s)
        while True:
            call = self._stub.Generate(
                request, timeout=patience.left_s(), metadata=call_metadata(self._access)
            )
            has_begun = False
            try:
                for response in call:
                    has_begun = True
                    yield _chunk(response)
                return
            except grpc.RpcError as failure:
                error = error_of(failure)
            finally:
                call.cancel()
            if has_begun:
                raise error
            time.sleep(patience.pause_s(error))

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
        """Tokens and text as they come, for a request made with `request_of`.

        Args:
            timeout_s: for everything, pauses included.
            retries: how often a request that was not begun is tried again, when the gateway says.

        Raises:
            ExpertMeshError: as the gateway answered.
        """
        patience = Patience(retries, timeout_s)
        while True:
            call = self._stub.Generate(
                request, timeout=patience.left_s(), metadata=call_metadata(self._access)
            )
            has_begun = False
            try:
                async for response in call:
                    has_begun = True
                    yield _chunk(response)
                return
            except grpc.RpcError as failure:
                error = error_of(failure)
            finally:
                call.cancel()
            if has_begun:
                raise error
            await asyncio.sleep(patience.pause_s(error))


def call_metadata(access: Access) -> Metadata:
    """The token, and the W3C trace context of the caller's current span, whose trace goes on in the
    mesh."""
    from opentelemetry.propagate import inject

    carrier: dict[str, str] = {}
    inject(carrier)
    return (*access.metadata(), *carrier.items())
