"""What every engine needs: tokens on their way to a consumer, bounded admission, typed errors."""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress

from expertmesh.runtime.errors import Draining, ExpertMeshError, InternalError, QueueFull

_log = logging.getLogger(__name__)
_EWMA_WEIGHT = 0.1


class TokenStream:
    """The tokens of one request on their way to its consumer. Used on the event loop only.

    A slow consumer gets several steps' tokens at once, so nothing piles up but tokens.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._error: ExpertMeshError | None = None
        self._changed = asyncio.Event()
        self.num_tokens = 0
        self.finished = False

    def push(self, tokens: list[int]) -> None:
        self._tokens += tokens
        self.num_tokens += len(tokens)
        self._changed.set()

    def finish(self, error: ExpertMeshError | None = None) -> None:
        """No more tokens will come; those pushed are still read, then `error` is raised."""
        self._error = error
        self.finished = True
        self._changed.set()

    async def batches(self) -> AsyncGenerator[list[int], None]:
        """What was pushed since the last step, never empty."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._tokens:
                tokens, self._tokens = self._tokens, []
                yield tokens
            if self._error is not None:
                raise self._error
            if self.finished:
                return


class Admission:
    """Counts the open requests of an engine, refuses too many, and waits for them to end.

    Args:
        max_open: requests.
        max_tokens: tokens of their prompts; a request alone may have more.
    """

    def __init__(self, max_open: int, max_tokens: int = sys.maxsize) -> None:
        self._max_open = max_open
        self._max_tokens = max_tokens
        self._num_open = 0
        self._num_tokens = 0
        self._request_s = 0.0
        """Exponentially weighted mean time of a request."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.closing = False

    @contextmanager
    def admit(self, num_tokens: int = 0) -> Iterator[None]:
        """Holds one place.

        Args:
            num_tokens: of its prompt.

        Raises:
            QueueFull, Draining: see `Engine.submit`.
        """
        if self.closing:
            raise Draining("the gateway is stopping; ask another one")
        self._check_room(num_tokens)
        self._num_open += 1
        self._num_tokens += num_tokens
        self._idle.clear()
        started_s = time.monotonic()
        try:
            yield
        finally:
            self._num_open -= 1
            self._num_tokens -= num_tokens
            took_s = time.monotonic() - started_s
            self._request_s += _EWMA_WEIGHT * (took_s - self._request_s)
            if not self._num_open:
                self._idle.set()

    def _check_room(self, num_tokens: int) -> None:
        if self._num_open >= self._max_open:
            raise QueueFull(
                f"{self._num_open} requests are running or waiting, the most this gateway takes; "
                "retry later or raise max_waiting",
                max_open=self._max_open,
            ).after(self._next_place_s())
        if self._num_open and self._num_tokens + num_tokens > self._max_tokens:
            raise QueueFull(
                f"prompts of {self._num_tokens} tokens are running or waiting, and this gateway "
                f"takes {self._max_tokens} at most; retry later or raise max_prompt_tokens",
                max_prompt_tokens=self._max_tokens,
            ).after(self._next_place_s())

    def _next_place_s(self) -> float:
        """Time until one of the open requests ends, if they end evenly."""
        return self._request_s / max(1, self._num_open)

    async def drain(self, timeout_s: float) -> None:
        """Admits nothing from now on, and waits for the open requests at most this long."""
        self.closing = True
        if self._num_open:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)
        if self._num_open:
            _log.warning(
                "%d requests still run after %.1f s of draining", self._num_open, timeout_s
            )


def typed_error(error: Exception, *, closing: bool) -> ExpertMeshError:
    """The error one request sees for what a forward raised; several requests may share `error`."""
    if isinstance(error, ExpertMeshError):
        own = type(error)(error.message, **error.fields).after(error.retry_after_s)
        own.__cause__ = error
        return own
    if closing:
        return Draining("the gateway stopped before the answer was complete; ask another one")
    _log.error("the model's forward failed", exc_info=error)
    return InternalError("the model's forward failed; the gateway's log says why")
