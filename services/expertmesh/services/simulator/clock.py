"""A virtual clock and what is to happen by it."""

import heapq
import itertools
import math
from collections.abc import Callable


class Clock:
    """Jumps from one action to the next; actions of the same time happen in the order planned."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Have something done later, or at once after what is happening now."""
        self.at(self.now_s + delay_s, action)

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Have something done at a time, which must not be over."""
        heapq.heappush(self._heap, (time_s, next(self._order), action))

    @property
    def next_s(self) -> float:
        """When the next action is due; infinite if none is planned."""
        return self._heap[0][0] if self._heap else math.inf

    def step(self) -> None:
        """Go on to the next action and do it."""
        self.now_s, _, action = heapq.heappop(self._heap)
        action()
