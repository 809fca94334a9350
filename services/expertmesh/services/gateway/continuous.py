"""The engine over transformers' continuous batching: all requests share each forward.

Uses two internal methods of transformers 5.23's manager, so that a failed forward costs the
requests of its batch and nothing else; as shipped, it ends the generation thread for good. And its
list of the requests of a batch, to tell each what missing experts cost it.
"""

import asyncio
import copy
import itertools
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import ATTN_TYPE_TO_ALLOCATOR
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    OutputRouter,
)

from expertmesh.runtime.errors import InsufficientMemory, InternalError
from expertmesh.runtime.missing_experts import DegradedMass
from expertmesh.services.forward_scope import ForwardScope, Serving, to_nobody
from expertmesh.services.gateway.engine_config import EngineConfig
from expertmesh.services.gateway.paged_attention import use_separate_attention
from expertmesh.services.gateway.per_request import per_request_processors, sampling_kwargs
from expertmesh.services.gateway.sampling import GenerationRequest
from expertmesh.services.gateway.token_stream import Admission, TokenStream, typed_error
from expertmesh.services.gateway.turnstile import Turnstile


def why_not_continuous(model: Any) -> str | None:
    """Why transformers' continuous batching cannot run this model as `generate` does, or None."""
    config = model.config.get_text_config()
    if model._is_stateful:
        return "it keeps a recurrent state, which the paged cache cannot hold"
    unknown = set(getattr(config, "layer_types", None) or ()) - ATTN_TYPE_TO_ALLOCATOR.keys()
    if unknown:
        return f"the paged cache has no {', '.join(sorted(unknown))} layers"
    if getattr(config, "kv_lora_rank", None):
        return "its keys and values differ in width (multi-head latent attention)"
    greedy = copy.deepcopy(model.generation_config)
    greedy.update(**_NO_SAMPLING)
    processors = model._get_logits_processor(greedy, input_ids_seq_length=1)
    extra = [type(processor).__name__ for processor in processors]
    if extra:
        return f"generation_config.json asks for {', '.join(extra)}, which it drops"
    return None


_NO_SAMPLING = {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


class ContinuousEngine:
    """An `Engine`: requests join and leave the running batch at every step.

    Args:
        model: becomes the engine's own: its attention implementation may be changed. Whoever else
            needs it takes `share_skeleton(model)`.
        config: sizes; sized explicitly as transformers' own estimate takes seconds and memory.
    """

    def __init__(self, model: Any, config: EngineConfig, serving: Serving = to_nobody) -> None:
        use_separate_attention()
        self._config = config
        self._vocab_size = model.config.get_text_config().vocab_size
        max_open = config.max_running + config.max_waiting
        self._admission = Admission(max_open, config.max_prompt_tokens)
        self._turnstile = Turnstile(config.max_running)
        self._streams: dict[str, TokenStream] = {}
        self._degraded: dict[str, DegradedMass] = {}
        self._ids = itertools.count()
        self._manager = _Manager(
            model=model,
            generation_config=GenerationConfig(
                **_NO_SAMPLING | {"do_sample": True}, eos_token_id=-1, max_new_tokens=1
            ),
            continuous_batching_config=_batching_config(config),
        )
        self._manager.serve_as = lambda batch: serving(self._scope(batch))
        self._manager.logit_processor = per_request_processors(self._vocab_size)

    @property
    def max_positions(self) -> int:
        return self._config.kv_cache_tokens

    async def start(self) -> None:
        self._manager.output_router = _Outlet(asyncio.get_running_loop(), self)
        try:
            await asyncio.to_thread(self._manager.warmup)  # allocates the cache
        except MemoryError as error:
            raise InsufficientMemory(
                f"keys and values of {self._config.kv_cache_tokens} tokens do not fit this device "
                f"({error}); lower kv_cache_tokens or max_batch_tokens"
            ) from error
        self._manager.start()

    def is_alive(self) -> bool:
        return self._manager.is_running() and not self._admission.closing

    async def submit(
        self, request: GenerationRequest, degraded: DegradedMass | None = None
    ) -> AsyncGenerator[list[int], None]:
        with self._admission.admit(len(request.prompt)):
            turn = self._turnstile.turn(request.origin, request.num_tokens)
            async with turn, aclosing(self._run(request, degraded or DegradedMass())) as steps:
                async for tokens in steps:
                    yield tokens

    async def _run(
        self, request: GenerationRequest, degraded: DegradedMass
    ) -> AsyncGenerator[list[int], None]:
        request_id, stream = str(next(self._ids)), TokenStream()
        self._streams[request_id] = stream
        self._degraded[request_id] = degraded
        try:
            self._add(request_id, request)
            async for tokens in stream.batches():
                yield tokens
        finally:
            del self._streams[request_id], self._degraded[request_id]
            if not stream.finished:
                self._manager.cancel_request(request_id)

    async def close(self, drain_s: float = 0.0) -> None:
        await self._admission.drain(drain_s)
        self._turnstile.close()
        await asyncio.to_thread(self._manager.stop, block=True, hard_stop=True)
        self._manager.destroy()

    def _add(self, request_id: str, request: GenerationRequest) -> None:
        accepted = self._manager.add_request(
            list(request.prompt),
            request_id=request_id,
            max_new_tokens=request.max_new_tokens,
            streaming=True,
            eos_token_id=sorted(request.eos_ids) or -1,
            **sampling_kwargs(request, self._vocab_size),
        )
        if accepted is None:
            raise InternalError("the generation thread has ended; the gateway's log says why")

    def _scope(self, batch: list[Any]) -> ForwardScope:
        """Of the next forward, whose tokens lie request after request."""
        nobody = DegradedMass()  # of a request that has ended since
        return ForwardScope(
            shares=[
                (own.query_length, self._degraded.get(own.state.request_id, nobody))
                for own in batch
            ]
        )

    def on_outputs(self, outputs: list[Any]) -> None:
        """Called on the event loop after each step; an output has all its request's tokens."""
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.push(output.generated_tokens[stream.num_tokens :])
                if output.is_finished():
                    stream.finish()

    def on_failure(self, request_id: str, error: Exception) -> None:
        """Called on the event loop for each request that a failure has ended."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.finish(typed_error(error, closing=self._admission.closing))


def _batching_config(config: EngineConfig) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(
        page_size=config.page_size,
        num_blocks=math.ceil(config.kv_cache_tokens / config.page_size),
        max_batch_tokens=config.max_batch_tokens,
        max_requests_per_batch=config.max_running,
        allow_block_sharing=config.share_prefixes,
        auto_switch_to_flash=config.flash_attention,
        # remote calls can neither be captured in a graph nor compiled
        use_cuda_graph=False,
        use_async_batching=False,
        default_compile_level=0,
    )


class _Outlet(OutputRouter):  # type: ignore[misc]
    """Hands outputs to the event loop with one wake-up per step, and errors as exceptions
    (transformers turns them into strings)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, engine: ContinuousEngine) -> None:
        super().__init__()
        self._loop = loop
        self._engine = engine

    def deliver_batch(self, outputs: list[Any]) -> None:
        self._loop.call_soon_threadsafe(self._engine.on_outputs, outputs)

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._engine.on_failure, state.request_id, error)


class _StepFailed(Exception):
    """The forward of a batch raised what `error` holds."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _Manager(ContinuousBatchingManager):  # type: ignore[misc]
    """Survives errors: transformers' loop fails every request and ends its thread on any."""

    serve_as: Callable[[list[Any]], AbstractContextManager[None]]
    """Around the forward of these requests (transformers' FutureRequestState)."""

    def _generation_step(self) -> None:
        batch = self.batch_processor.inputs_and_outputs.requests_in_batch
        try:
            with self.serve_as(batch):
                super()._generation_step()
        except Exception as error:
            raise _StepFailed(error) from error

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        torch.get_num_threads()  # makes torch set OpenMP's number, which belongs to the thread
        try:
            return bool(super()._generation_loop_body(batch_processor, bootstrapping))
        except _StepFailed as failed:
            batch_processor.handle_batch_error(failed.error)
        except Exception as error:
            # between two forwards: which requests are concerned is unknown
            batch_processor.fail_all_requests(error)
        batch_processor.scheduler.block_new_requests = False  # as when a request ends well
        return True
