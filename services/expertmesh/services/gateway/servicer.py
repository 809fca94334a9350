"""GenerateService over an engine; errors are runtime.errors, which the server turns into statuses.

Shape suffixes: B batch, S sequence length, V vocabulary.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import torch
from opentelemetry.trace import SpanKind

from expertmesh.runtime import tensors
from expertmesh.runtime.errors import (
    ExpertMeshError,
    InvalidInput,
    MessageTooLarge,
    UnknownModel,
)
from expertmesh.runtime.missing_experts import DegradedMass
from expertmesh.runtime.origin import Origin, caller_of, priority_of
from expertmesh.runtime.telemetry import Telemetry
from expertmesh.runtime.trace_context import inject, traceparent_of
from expertmesh.services.forward_scope import Serving, to_nobody, whole
from expertmesh.services.gateway.answer import Answer, answer_to
from expertmesh.services.gateway.engine import Engine
from expertmesh.services.gateway.prompt import prompt_of
from expertmesh.services.gateway.request_routing import RequestRouting
from expertmesh.services.gateway.running import RunningCalls
from expertmesh.services.gateway.sampling import Limits, to_request
from expertmesh.services.gateway.scoring import forward, score_mask, score_tokens
from expertmesh.services.gateway.text_stream import TextStream
from expertmesh.services.gateway.token_stream import Admission
from expertmesh.v1 import generate_pb2 as pb
from expertmesh.v1 import generate_pb2_grpc, router_pb2

SERVICE = pb.DESCRIPTOR.services_by_name["GenerateService"].full_name
STAGE = "gateway"


@dataclass(frozen=True)
class ServedModel:
    """A model as the gateway serves it."""

    info: router_pb2.ModelInfo
    engine: Engine
    scorer: Any
    """A `transformers.PreTrainedModel` for plain forwards, never the engine's own object."""
    limits: Limits
    tokenizer: Any | None = None
    """A `transformers.PreTrainedTokenizerBase`; without one only token ids are served."""

    def tokenize(self, message: pb.GenerateRequest) -> list[int]:
        """The prompt of a message as ids; [] if it has none."""
        if message.WhichOneof("prompt") != "text":
            return list(message.tokens.ids)
        ids: list[int] = self._need_tokenizer("text").encode(message.text)
        return ids

    def text_stream(self, stop: tuple[str, ...]) -> TextStream:
        """Decodes an answer; always "" without a tokenizer."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            if stop:
                self._need_tokenizer("stop")
            return TextStream(lambda ids: "")

        def decode(ids: Any) -> str:
            text: str = tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            return text

        return TextStream(decode, stop)

    def _need_tokenizer(self, wanted: str) -> Any:
        if self.tokenizer is None:
            raise InvalidInput.of(
                wanted, expected="nothing, as this checkpoint has no tokenizer", got="text"
            )
        return self.tokenizer


class GenerateServicer(generate_pb2_grpc.GenerateServiceServicer):
    """Serves one model, under the name its info has.

    Args:
        model: with a started engine.
        max_response_bytes: the largest message this server sends; bounds `Score`.
        max_waiting_scores: Score calls that may wait for the one running.
        routing: what requests may ask for.
        serving: tells the model's experts whom a forward is for.
    """

    def __init__(
        self,
        model: ServedModel,
        telemetry: Telemetry,
        *,
        max_response_bytes: int,
        max_waiting_scores: int = 16,
        routing: RequestRouting | None = None,
        serving: Serving = to_nobody,
    ) -> None:
        self._model = model
        self._telemetry = telemetry
        self.running = RunningCalls()
        self._max_response_bytes = max_response_bytes
        self._routing = routing or RequestRouting()
        self._serving = serving
        self._scores = Admission(1 + max_waiting_scores)
        self._score_worker = ThreadPoolExecutor(1, "score", torch.get_num_threads)

    def close(self) -> None:
        """Waits for a running Score; takes no more."""
        self._scores.closing = True
        self._score_worker.shutdown()

    async def Generate(
        self,
        request: pb.GenerateRequest,
        context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse],
    ) -> AsyncIterator[pb.GenerateResponse]:
        """One message per step of the engine; the last one has a finish reason.

        Raises:
            UnknownModel, InvalidInput: before anything is computed.
            ExpertMeshError: as `Engine.submit` raises.
        """
        origin = Origin(caller_of(context), priority_of(request.priority))
        with self._traced(context, "Generate", origin):
            model = self._named(request.model)
            defaults = model.scorer.generation_config
            prompt = await prompt_of(request, model.tokenize, model.limits)
            asked = to_request(request, prompt, defaults, model.limits)
            routing = await self._routing.of_generate(request)
            asked = replace(asked, routing=routing, origin=origin)
            answer = await answer_to(asked, model.text_stream(asked.stop))
            started_s = time.monotonic()
            async with aclosing(model.engine.submit(asked, answer.degraded)) as steps:
                async for tokens in steps:
                    self._measure(answer, len(tokens), started_s)
                    yield answer.step(tokens)
                    if answer.finish:
                        return

    @contextmanager
    def _traced(self, context: Any, method: str, origin: Origin) -> Iterator[None]:
        """The call's span, counted, and one of the running calls."""
        metrics = self._telemetry.metrics
        metrics.calls.add(1, STAGE, method)
        parent = traceparent_of(context.invocation_metadata()) if self._telemetry.enabled else ""
        with self._telemetry.span(f"gateway.{method}", parent=parent, kind=SpanKind.SERVER):
            try:
                with self.running.holding(origin, inject() if self._telemetry.enabled else ""):
                    yield
            except ExpertMeshError as error:
                metrics.errors.add(1, STAGE, error.code.name)
                raise

    def _measure(self, answer: Answer, num_tokens: int, started_s: float) -> None:
        metrics, name = self._telemetry.metrics, self._model.info.name
        if answer.num_tokens == answer.request.num_generated:
            metrics.tokens.add(len(answer.request.prompt), STAGE)
            metrics.time_to_first_token.record(time.monotonic() - started_s, name)
        metrics.generated_tokens.add(num_tokens, name)

    async def Score(
        self,
        request: pb.ScoreRequest,
        context: grpc.aio.ServicerContext[pb.ScoreRequest, pb.ScoreResponse],
    ) -> pb.ScoreResponse:
        """Logits of one plain forward; calls run one after the other.

        Raises:
            UnknownModel, InvalidInput, MessageTooLarge: before anything is computed.
            QueueFull: too many calls wait.
        """
        with self._traced(context, "Score", Origin(caller_of(context))):
            model = self._named(request.model)
            tokens_BS = score_tokens(request.tokens, model.limits)
            mask_BS = score_mask(request, tokens_BS.shape)
            self._check_size(tokens_BS, model)
            options = await self._routing.of_score(request)
            degraded = DegradedMass()

            def scored() -> torch.Tensor:
                with self._serving(whole(degraded, options)):
                    return forward(model.scorer, tokens_BS, mask_BS)

            with self._scores.admit():
                loop = asyncio.get_running_loop()
                logits_BSV = await loop.run_in_executor(self._score_worker, scored)
            logits = tensors.to_proto(logits_BSV)
            return pb.ScoreResponse(logits=logits, degraded_mass=degraded.to_proto())

    async def ListModels(
        self,
        request: router_pb2.ListModelsRequest,
        context: grpc.aio.ServicerContext[
            router_pb2.ListModelsRequest, router_pb2.ListModelsResponse
        ],
    ) -> router_pb2.ListModelsResponse:
        """The served model."""
        return router_pb2.ListModelsResponse(models=[self._model.info])

    def _named(self, name: str) -> ServedModel:
        served = self._model.info.name
        if name not in ("", served):
            raise UnknownModel(
                f"model {name!r} is not served here; served: {served!r}", model=name, served=served
            )
        return self._model

    def _check_size(self, tokens_BS: torch.Tensor, model: ServedModel) -> None:
        num_bytes = tokens_BS.numel() * model.limits.vocab_size * model.scorer.dtype.itemsize
        if num_bytes > self._max_response_bytes:
            raise MessageTooLarge(
                f"the logits of {list(tokens_BS.shape)} tokens take {num_bytes} bytes, more than "
                f"the {self._max_response_bytes} this gateway sends; score fewer tokens per call",
                num_bytes=num_bytes,
                max_message_bytes=self._max_response_bytes,
            )
