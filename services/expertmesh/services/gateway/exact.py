"""The engine that runs transformers' own `generate`, one request at a time."""

import asyncio
import copy
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from expertmesh.runtime.missing_experts import DegradedMass
from expertmesh.services.forward_scope import ForwardScope, Serving, to_nobody, whole
from expertmesh.services.gateway.engine_config import EngineConfig
from expertmesh.services.gateway.sampling import GenerationRequest
from expertmesh.services.gateway.token_stream import Admission, TokenStream, typed_error
from expertmesh.services.gateway.turnstile import Turnstile


class ExactEngine:
    """An `Engine` whose tokens are, bit for bit, those of the user's own `model.generate`.

    For architectures that continuous batching cannot run, and for whoever wants a seed honoured.
    """

    def __init__(self, model: Any, config: EngineConfig, serving: Serving = to_nobody) -> None:
        self._model = model
        self._serving = serving
        self._admission = Admission(1 + config.max_waiting, config.max_prompt_tokens)
        self._turnstile = Turnstile(1)
        # OpenMP's number of threads belongs to the thread; asking torch for it makes torch set it
        self._worker = ThreadPoolExecutor(1, "generate", torch.get_num_threads)
        self._stop_all = threading.Event()

    @property
    def max_positions(self) -> None:
        return None

    async def start(self) -> None:
        """Nothing to allocate."""

    def is_alive(self) -> bool:
        return not self._admission.closing

    async def submit(
        self, request: GenerationRequest, degraded: DegradedMass | None = None
    ) -> AsyncGenerator[list[int], None]:
        with self._admission.admit(len(request.prompt)):
            async with self._turnstile.turn(request.origin, request.num_tokens):
                run = _Run(asyncio.get_running_loop(), TokenStream(), self._stop_all)
                scope = whole(degraded or DegradedMass(), request.routing)
                self._worker.submit(self._generate, request, run, scope)
                try:
                    async for tokens in run.stream.batches():
                        yield tokens
                finally:
                    run.cancelled.set()

    async def close(self, drain_s: float = 0.0) -> None:
        await self._admission.drain(drain_s)
        self._turnstile.close()
        self._stop_all.set()
        await asyncio.to_thread(self._worker.shutdown)

    def _generate(self, request: GenerationRequest, run: "_Run", scope: ForwardScope) -> None:
        """In the worker thread."""
        error: Exception | None = None
        try:
            if not run.is_over():
                _seed(request)
                prompt_1S = torch.tensor([request.prompt], device=self._model.device)
                with self._serving(scope):
                    self._model.generate(
                        prompt_1S,
                        attention_mask=torch.ones_like(prompt_1S),
                        generation_config=_generation_config(self._model, request),
                        streamer=_Streamer(run.push),
                        stopping_criteria=StoppingCriteriaList([run.stops]),
                    )
        except Exception as raised:  # the thread's edge: it goes to the request's consumer
            error = raised
        run.end(error)


class _Run:
    """One request: what its worker and its consumer tell each other."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, stream: TokenStream, stop_all: threading.Event
    ) -> None:
        self.stream = stream
        self.cancelled = threading.Event()
        self._stop_all = stop_all
        self._loop = loop

    def is_over(self) -> bool:
        """Whether nobody waits for more tokens."""
        return self.cancelled.is_set() or self._stop_all.is_set()

    def stops(self, ids_1S: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """A StoppingCriteria: after every token."""
        return torch.full((ids_1S.shape[0],), self.is_over(), device=ids_1S.device)

    def push(self, tokens: list[int]) -> None:
        self._loop.call_soon_threadsafe(self.stream.push, tokens)

    def end(self, error: Exception | None) -> None:
        if error is None and self._stop_all.is_set() and not self.cancelled.is_set():
            error = RuntimeError("stopped")
        closing = self._stop_all.is_set()
        typed = None if error is None else typed_error(error, closing=closing)
        self._loop.call_soon_threadsafe(self.stream.finish, typed)


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Passes on what `generate` puts, without the prompt, which comes first."""

    def __init__(self, push: Callable[[list[int]], None]) -> None:
        self._push = push
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._push(value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """The end is seen when `generate` returns."""


def _seed(request: GenerationRequest) -> None:
    """torch draws from one generator per process: without a seed, not from the last request's."""
    if request.seed is None:
        torch.seed()
    else:
        torch.manual_seed(request.seed)


def _generation_config(model: Any, request: GenerationRequest) -> Any:
    config = copy.deepcopy(model.generation_config)
    config.update(
        max_new_tokens=request.max_new_tokens,
        max_length=None,
        do_sample=request.do_sample,
        temperature=request.temperature if request.do_sample else None,
        top_k=request.top_k if request.do_sample else None,
        top_p=request.top_p if request.do_sample else None,
        eos_token_id=sorted(request.eos_ids),  # not None: generate would take the model's own
        disable_compile=True,  # remote calls cannot be compiled
    )
    if config.pad_token_id is None:
        config.pad_token_id = 0  # never used with one request, but generate wants one
    return config
