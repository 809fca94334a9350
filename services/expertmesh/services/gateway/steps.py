"""The thread that runs the model: one forward after the other over the requests there are."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from expertmesh.services.forward_scope import ForwardScope, Serving
from expertmesh.services.gateway.engine_config import EngineConfig
from expertmesh.services.gateway.kv_cache import KeyValueBudget
from expertmesh.services.gateway.outbox import Outbox, Outcome
from expertmesh.services.gateway.packed_attention import PackedModel
from expertmesh.services.gateway.per_request import next_tokens
from expertmesh.services.gateway.schedule import Generation, Schedule, Share


class StepThread:
    """Runs generations until they end.

    Args:
        deliver: called on the thread with the outcomes of steps, see `Outbox`.
    """

    def __init__(
        self,
        model: Any,
        config: EngineConfig,
        serving: Serving,
        deliver: Callable[[list[Outcome]], None],
    ) -> None:
        self._model = PackedModel(model)
        self._vocab_size = model.config.get_text_config().vocab_size
        self._serving = serving
        self._outbox = Outbox(config.stream_interval_s, deliver)
        self.budget = KeyValueBudget(
            self._model.num_layers, config.kv_cache_tokens, config.page_size
        )
        self._schedule = Schedule(config, self.budget)
        self._changed = threading.Condition()
        self._new: list[Generation] = []
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def add(self, generation: Generation) -> bool:
        """Run it; its outcomes are delivered. Returns False once `stop` was called."""
        with self._changed:
            if not self._is_stopped:
                self._new.append(generation)
                self._changed.notify()
            return not self._is_stopped

    def stop(self) -> None:
        """End after the forward that runs; what has not ended by then gets an error."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    # -- on the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        torch.get_num_threads()  # makes torch set OpenMP's number, which belongs to the thread
        is_idle = False
        while self._take_new(wait=is_idle):
            try:
                is_idle = not self._step()
            except Exception as error:  # a bug between two forwards: whom it concerns is unknown
                self._fail_all(error)
        self._fail_all(RuntimeError("stopped"))

    def _take_new(self, wait: bool) -> bool:
        """Whether to go on.

        Args:
            wait: until there is something new.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._new or self._is_stopped)
            new, self._new = self._new, []
        for generation in new:
            self._schedule.add(generation)
        return not self._is_stopped

    def _step(self) -> bool:
        """One forward; returns whether there was anything to do."""
        shares = self._schedule.next_batch()
        if not shares:
            return False
        if any(share.length > 1 for share in shares):
            self._outbox.flush()  # a long step is to come
        try:
            with torch.no_grad(), self._serving(_scope(shares)):
                tokens = self._next_tokens(shares)
        except Exception as error:  # it goes to those whose forward it was
            self._end([Outcome(own.generation, is_last=True, error=error) for own in shares])
            return True
        outcomes = []
        for share in shares:
            is_last = share.is_last
            share.generation.num_computed += share.length
            if is_last:
                token = tokens.pop(0)
                outcomes.append(Outcome(share.generation, token, share.generation.add(token)))
        self._end(outcomes)
        return True

    def _next_tokens(self, shares: list[Share]) -> list[int]:
        """Of the shares that are their generation's last."""
        tokens_T: list[int] = []
        wanted: list[int] = []
        for share in shares:
            tokens_T += share.tokens
            if share.is_last:
                wanted.append(len(tokens_T) - 1)
        parts = [share.part for share in shares]
        logits_WV = self._model.logits(tokens_T, parts, wanted)
        requests = [share.generation.request for share in shares if share.is_last]
        return next_tokens(logits_WV, requests, self._vocab_size)

    def _end(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            if outcome.is_last:
                self._schedule.end(outcome.generation)
        self._outbox.put(outcomes)

    def _fail_all(self, error: Exception) -> None:
        failed = [*self._schedule]
        self._schedule.clear()
        with self._changed:
            failed += self._new
            self._new = []
        self._outbox.put([Outcome(generation, is_last=True, error=error) for generation in failed])


def _scope(shares: list[Share]) -> ForwardScope:
    return ForwardScope(shares=[(share.length, share.generation.degraded) for share in shares])
