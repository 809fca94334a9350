"""Whose prompt is run next: equal shares between callers, interactive before batch."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from expertmesh.runtime.errors import Draining
from expertmesh.runtime.fair_queue import FairQueue, Queued
from expertmesh.runtime.origin import Origin

AGEING_S = 5.0
"""Batch prompts get a turn before interactive ones each time they have had none for so long."""


@dataclass(eq=False)
class _Waiting(Queued):
    """A prompt; its rows are its tokens."""

    let_in: asyncio.Future[None] = field(default_factory=asyncio.Future)


class Turnstile:
    """Lets so many in at the same time."""

    def __init__(self, max_inside: int) -> None:
        self._max_inside = max_inside
        self._num_inside = 0
        self._is_closed = False
        self._queue: FairQueue[_Waiting] = FairQueue(AGEING_S)

    @asynccontextmanager
    async def turn(self, origin: Origin, num_tokens: int) -> AsyncIterator[None]:
        """Waits for a place and holds it.

        Args:
            num_tokens: what it may cost: prompt and answer.

        Raises:
            Draining: it is closed.
        """
        await self._enter(origin, num_tokens)
        try:
            yield
        finally:
            self._leave()

    def close(self) -> None:
        """Let nobody in any more: who waits gets Draining."""
        self._is_closed = True
        while waiting := self._next():
            waiting.let_in.set_exception(_draining())

    async def _enter(self, origin: Origin, num_tokens: int) -> None:
        if self._is_closed:
            raise _draining()
        if self._num_inside < self._max_inside:
            self._num_inside += 1
            return
        waiting = _Waiting(origin, 0, num_tokens, 0)
        self._queue.add(waiting, time.monotonic())
        try:
            await waiting.let_in
        except asyncio.CancelledError:
            self._queue.remove(waiting)
            if not waiting.let_in.cancelled() and waiting.let_in.exception() is None:
                self._leave()  # its turn had come
            raise

    def _leave(self) -> None:
        if waiting := self._next():
            waiting.let_in.set_result(None)
        else:
            self._num_inside -= 1

    def _next(self) -> _Waiting | None:
        for waiting in self._queue.turn(time.monotonic()):
            if waiting.let_in.cancelled():  # it is about to leave
                self._queue.remove(waiting)
                continue
            self._queue.serve(waiting)
            return waiting
        return None


def _draining() -> Draining:
    return Draining("the gateway is stopping; ask another one")
