"""How many calls a server works on at the same time, in number and in bytes."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from expertmesh.runtime.errors import QueueFull

_EWMA_WEIGHT = 0.1


class InFlight:
    """Admits calls up to two bounds, and no caller to more than what it leaves free.

    So one caller gets at most half, two get a third each, and whoever comes next finds a place
    (Choudhury, Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches", 1998).
    A call alone is always admitted.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, max_calls: int, max_bytes: int, clock: Callable[[], float]) -> None:
        self.max_calls = max_calls
        self.max_bytes = max_bytes
        self._clock = clock
        self._calls: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self.num_calls = 0
        self.num_bytes = 0
        self._call_s = 0.0
        """Exponentially weighted mean time of a call."""

    @contextmanager
    def admit(self, caller: str, num_bytes: int) -> Iterator[None]:
        """Holds one place.

        Raises:
            QueueFull: there is none for this caller now.
        """
        if self.num_calls:
            self._check(self._calls[caller] + 1, self.num_calls + 1, self.max_calls, "calls")
            own_bytes = self._bytes[caller] + num_bytes
            self._check(own_bytes, self.num_bytes + num_bytes, self.max_bytes, "bytes")
        self._add(caller, 1, num_bytes)
        started_s = self._clock()
        try:
            yield
        finally:
            self._add(caller, -1, -num_bytes)
            self._call_s += _EWMA_WEIGHT * (self._clock() - started_s - self._call_s)

    def _add(self, caller: str, calls: int, num_bytes: int) -> None:
        self.num_calls += calls
        self.num_bytes += num_bytes
        self._calls[caller] += calls
        self._bytes[caller] += num_bytes
        if not self._calls[caller]:
            del self._calls[caller], self._bytes[caller]

    def _check(self, own: int, total: int, limit: int, unit: str) -> None:
        """Refuse a total above the limit, and an own share above what would be left of it."""
        if own > limit - total + 1 or total > limit:
            raise QueueFull(
                f"with this call {own} {unit} of this caller and {total} of all would be worked "
                f"on, of {limit} at most; retry later or ask another router",
                **{f"max_{unit}": limit, unit: total},
            ).after(self._call_s)
