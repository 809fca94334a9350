"""Trying again what the mesh says can succeed later: when it says, and no longer than asked for."""

import random
import time
from collections.abc import Callable

from expertmesh.runtime.errors import ExpertMeshError

_FIRST_DELAY_S = 0.05
_MOST_DELAY_S = 2.0
_JITTER = 0.5


class Patience:
    """The tries of one call.

    Args:
        retries: how often it may be tried again.
        timeout_s: for all tries and the pauses between them; None is for ever.
        clock: seconds, monotonic.
        draw: a number from 0 to 1.
    """

    def __init__(
        self,
        retries: int,
        timeout_s: float | None,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._left = retries
        self._clock = clock
        self._draw = draw
        self._end_s = None if timeout_s is None else clock() + timeout_s
        self._next_s = _FIRST_DELAY_S

    def left_s(self) -> float | None:
        """Time that the next try may take."""
        return None if self._end_s is None else max(0.0, self._end_s - self._clock())

    def pause_s(self, error: ExpertMeshError) -> float:
        """How long to wait before the next try: as the callee said, else longer each time, and a
        little more by chance, so that those who were refused together do not come back together.

        Raises:
            ExpertMeshError: the error itself, if trying again is of no use or there is no time.
        """
        told_s, self._next_s = self._next_s, min(2 * self._next_s, _MOST_DELAY_S)
        if error.retry_after_s is not None:
            told_s = error.retry_after_s
        pause_s = told_s * (1 + _JITTER * self._draw())
        left_s = self.left_s()
        if not error.retryable or self._left <= 0 or (left_s is not None and pause_s >= left_s):
            raise error
        self._left -= 1
        return pause_s
