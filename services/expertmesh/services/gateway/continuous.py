"""The engine that runs all requests in the same forwards, which they join and leave at any step."""

import asyncio
import copy
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from expertmesh.runtime.errors import Draining, InternalError
from expertmesh.runtime.missing_experts import DegradedMass
from expertmesh.services.forward_scope import Serving, to_nobody
from expertmesh.services.gateway.engine_config import EngineConfig
from expertmesh.services.gateway.kv_cache import check_fits
from expertmesh.services.gateway.outbox import Outcome
from expertmesh.services.gateway.sampling import GenerationRequest
from expertmesh.services.gateway.schedule import Generation
from expertmesh.services.gateway.steps import StepThread
from expertmesh.services.gateway.token_stream import Admission, TokenStream, typed_error
from expertmesh.services.gateway.turnstile import Turnstile

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_NO_SAMPLING = {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def why_not_continuous(model: Any) -> str | None:
    """Why requests cannot share forwards of this model with the tokens of `generate`, or None."""
    config = model.config.get_text_config()
    if model._is_stateful:
        return "it keeps a recurrent state, which does not go by tokens"
    unknown = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if unknown:
        return f"attention per request has no {', '.join(sorted(unknown))} layers"
    if getattr(config, "kv_lora_rank", None):
        return "its keys and values differ in width (multi-head latent attention)"
    greedy = copy.deepcopy(model.generation_config)
    greedy.update(**_NO_SAMPLING)
    processors = model._get_logits_processor(greedy, input_ids_seq_length=1)
    extra = [type(processor).__name__ for processor in processors]
    if extra:
        return f"generation_config.json asks for {', '.join(extra)}, which it drops"
    return None


class ContinuousEngine:
    """An `Engine`: requests join and leave the running batch at every step.

    Args:
        model: becomes the engine's own: its attention implementation is changed. Whoever else
            needs it takes `share_skeleton(model)`.
        config: sizes.
    """

    def __init__(self, model: Any, config: EngineConfig, serving: Serving = to_nobody) -> None:
        self._config = config
        self._model = model
        max_open = config.max_running + config.max_waiting
        self._admission = Admission(max_open, config.max_prompt_tokens)
        self._turnstile = Turnstile(config.max_running)
        self._steps = StepThread(model, config, serving, self._deliver)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def max_positions(self) -> int:
        return self._config.kv_cache_tokens

    async def start(self) -> None:
        check_fits(self._model, self._config.kv_cache_tokens)
        self._loop = asyncio.get_running_loop()
        self._steps.start()

    def is_alive(self) -> bool:
        return self._steps.is_alive() and not self._admission.closing

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
        generation = Generation(request, degraded, TokenStream(), self._steps.budget.new())
        if not self._steps.add(generation):
            raise Draining("the gateway is stopping; ask another one")
        if not self._steps.is_alive():
            raise InternalError("the generation thread has ended; the gateway's log says why")
        try:
            async for tokens in generation.stream.batches():
                yield tokens
        finally:
            generation.is_cancelled = True

    async def close(self, drain_s: float = 0.0) -> None:
        await self._admission.drain(drain_s)
        self._turnstile.close()
        await asyncio.to_thread(self._steps.stop)

    def _deliver(self, outcomes: list[Outcome]) -> None:
        """Called on the thread of the steps."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._on_outcomes, outcomes)

    def _on_outcomes(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            stream = outcome.generation.stream
            if outcome.token is not None:
                stream.push([outcome.token])
            if outcome.error is not None:
                stream.finish(typed_error(outcome.error, closing=self._admission.closing))
            elif outcome.is_last:
                stream.finish()
