"""GenerateService over an engine; errors are runtime.errors, which the server turns into statuses.

Shape suffixes: B batch, S sequence length, V vocabulary.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
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
from expertmesh.runtime.telemetry import Telemetry, inject, traceparent_of
from expertmesh.services.gateway.engine import Engine
from expertmesh.services.gateway.sampling import GenerationRequest, Limits, to_request
from expertmesh.services.gateway.text_stream import TextStream
from expertmesh.services.gateway.token_stream import Admission
from expertmesh.v1 import generate_pb2 as pb
from expertmesh.v1 import generate_pb2_grpc, router_pb2, tensor_pb2

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


@dataclass
class _Answer:
    """One answer on its way: text, counts and how it ends."""

    request: GenerationRequest
    text: TextStream
    num_tokens: int = 0
    finish: pb.FinishReason.ValueType = pb.FINISH_REASON_UNSPECIFIED
    _pieces: list[str] = field(default_factory=list)

    def step(self, tokens: list[int]) -> pb.GenerateResponse:
        """The message for these tokens; those after the end, if any, are dropped."""
        used = []
        for token in tokens:
            used.append(token)
            self._take(token)
            if self.finish:
                break
        message = pb.GenerateResponse(
            tokens=used, text="".join(self._pieces), finish_reason=self.finish
        )
        self._pieces.clear()
        if self.finish:
            message.prompt_tokens = len(self.request.prompt)
            message.generated_tokens = self.num_tokens
        return message

    def _take(self, token: int) -> None:
        self.num_tokens += 1
        piece = self.text.push([token])
        if not piece.stopped:
            self.finish = self._ended_by(token)
            if self.finish:
                self._pieces.append(piece.text)
                piece = self.text.flush()
        self._pieces.append(piece.text)
        if piece.stopped:
            self.finish = pb.FINISH_REASON_STOP

    def _ended_by(self, token: int) -> pb.FinishReason.ValueType:
        if token in self.request.eos_ids:
            return pb.FINISH_REASON_EOS
        if self.num_tokens == self.request.max_new_tokens:
            return pb.FINISH_REASON_LENGTH
        return pb.FINISH_REASON_UNSPECIFIED


class GenerateServicer(generate_pb2_grpc.GenerateServiceServicer):
    """Serves one model, under the name its info has.

    Args:
        model: with a started engine.
        max_response_bytes: the largest message this server sends; bounds `Score`.
        max_waiting_scores: Score calls that may wait for the one running.
    """

    def __init__(
        self,
        model: ServedModel,
        telemetry: Telemetry,
        *,
        max_response_bytes: int,
        max_waiting_scores: int = 16,
    ) -> None:
        self._model = model
        self._telemetry = telemetry
        self._traces: dict[int, str] = {}
        self._keys = itertools.count()
        self._max_response_bytes = max_response_bytes
        self._scores = Admission(1 + max_waiting_scores)
        self._score_worker = ThreadPoolExecutor(1, "score", torch.get_num_threads)

    def traceparents(self) -> tuple[str, ...]:
        """Of the calls that run now: a forward of the engine belongs to all of them."""
        return tuple(self._traces.values())

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
        with self._traced(context, "Generate"):
            model = self._named(request.model)
            defaults = model.scorer.generation_config
            asked = to_request(request, model.tokenize(request), defaults, model.limits)
            answer = _Answer(asked, model.text_stream(asked.stop))
            started_s = time.monotonic()
            async with aclosing(model.engine.submit(asked)) as steps:
                async for tokens in steps:
                    self._measure(answer, len(tokens), started_s)
                    yield answer.step(tokens)
                    if answer.finish:
                        return

    @contextmanager
    def _traced(self, context: Any, method: str) -> Iterator[None]:
        """The call's span, counted, and known to `traceparents` while it runs."""
        metrics = self._telemetry.metrics
        metrics.calls.add(1, STAGE, method)
        parent = traceparent_of(context.invocation_metadata()) if self._telemetry.enabled else ""
        with self._telemetry.span(f"gateway.{method}", parent=parent, kind=SpanKind.SERVER):
            key = next(self._keys)
            if self._telemetry.enabled:
                self._traces[key] = inject()
            try:
                yield
            except ExpertMeshError as error:
                metrics.errors.add(1, STAGE, error.code.name)
                raise
            finally:
                self._traces.pop(key, None)

    def _measure(self, answer: "_Answer", num_tokens: int, started_s: float) -> None:
        metrics, name = self._telemetry.metrics, self._model.info.name
        if not answer.num_tokens:
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
        with self._traced(context, "Score"):
            model = self._named(request.model)
            tokens_BS = _score_tokens(request.tokens, model.limits)
            mask_BS = _score_mask(request, tokens_BS.shape)
            self._check_size(tokens_BS, model)
            loop = asyncio.get_running_loop()
            with self._scores.admit():
                logits_BSV = await loop.run_in_executor(
                    self._score_worker, _forward, model.scorer, tokens_BS, mask_BS
                )
            return pb.ScoreResponse(logits=tensors.to_proto(logits_BSV))

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


def _forward(model: Any, tokens_BS: torch.Tensor, mask_BS: torch.Tensor | None) -> torch.Tensor:
    mask = None if mask_BS is None else mask_BS.to(model.device)
    with torch.no_grad():
        logits: torch.Tensor = model(tokens_BS.to(model.device), attention_mask=mask).logits
    return logits


def _score_tokens(message: tensor_pb2.Tensor, limits: Limits) -> torch.Tensor:
    tokens_BS = tensors.from_proto(message, "tokens")
    if tokens_BS.dtype != torch.int64 or tokens_BS.dim() != 2 or not tokens_BS.numel():
        got = f"{tensors.dtype_name(tokens_BS.dtype)}{list(tokens_BS.shape)}"
        raise InvalidInput.of("tokens", expected="int64 [B, S], not empty", got=got)
    if tokens_BS.shape[1] > limits.max_positions:
        expected = f"at most {limits.max_positions} positions"
        raise InvalidInput.of("tokens", expected=expected, got=tokens_BS.shape[1])
    lowest, highest = (int(bound) for bound in tokens_BS.aminmax())
    if lowest < 0 or highest >= limits.vocab_size:
        expected = f"ids from 0 to {limits.vocab_size - 1}"
        raise InvalidInput.of("tokens", expected=expected, got=f"{lowest} to {highest}")
    return tokens_BS


def _score_mask(request: pb.ScoreRequest, shape: torch.Size) -> torch.Tensor | None:
    if not request.HasField("mask"):
        return None
    mask_BS = tensors.from_proto(request.mask, "mask")
    if mask_BS.dtype != torch.int64 or mask_BS.shape != shape:
        got = f"{tensors.dtype_name(mask_BS.dtype)}{list(mask_BS.shape)}"
        raise InvalidInput.of("mask", expected=f"int64 {list(shape)} as tokens", got=got)
    if not bool(((mask_BS == 0) | (mask_BS == 1)).all()):
        raise InvalidInput.of("mask", expected="0 or 1", got="other values")
    return mask_BS
