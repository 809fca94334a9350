"""How much each caller may call: a token bucket for calls begun, a count of calls running. Pure."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from expertmesh.runtime.errors import RateLimited
from expertmesh.runtime.security.settings import CallLimits

_FIRST_CALL_S = 0.1
"""Assumed length of a caller's calls until one has ended."""
_EWMA_WEIGHT = 0.2
_MAX_CALLERS = 10_000
"""Callers remembered; above it, those who have no calls and a full bucket are forgotten."""


class _Meter:
    """One caller's calls."""

    def __init__(self, limits: CallLimits, now_s: float) -> None:
        self.limits = limits
        self.running = 0
        self.call_s = _FIRST_CALL_S
        self._calls = float(limits.burst_calls)
        """That may begin now."""
        self._filled_s = now_s

    def fill(self, now_s: float) -> float:
        """Calls that may begin now."""
        rate = self.limits.calls_per_s or 0.0
        grown = self._calls + rate * (now_s - self._filled_s)
        self._calls, self._filled_s = min(grown, float(self.limits.burst_calls)), now_s
        return self._calls

    def begin(self, caller: str, now_s: float) -> None:
        """Count a call, or raise RateLimited: a refused call costs nothing."""
        limits = self.limits
        if limits.running_calls is not None and self.running >= limits.running_calls:
            what = f"{limits.running_calls} calls at the same time"
            raise _limited(caller, what, self.call_s / limits.running_calls)
        if limits.calls_per_s is not None:
            calls = self.fill(now_s)
            if calls < 1:
                what = f"{limits.calls_per_s:g} calls per second"
                raise _limited(caller, what, (1 - calls) / limits.calls_per_s)
            self._calls = calls - 1
        self.running += 1

    def end(self, took_s: float) -> None:
        """A call has ended."""
        self.running -= 1
        self.call_s += _EWMA_WEIGHT * (took_s - self.call_s)

    def is_idle(self, now_s: float) -> bool:
        """Whether forgetting it changes nothing."""
        return not self.running and self.fill(now_s) >= self.limits.burst_calls


class CallMeters:
    """The calls of all callers.

    Args:
        default: of callers with no limits of their own.
    """

    def __init__(self, default: CallLimits) -> None:
        self._default = default
        self._meters: dict[str, _Meter] = {}

    @contextmanager
    def running(
        self, caller: str, own: CallLimits | None, clock: Callable[[], float]
    ) -> Iterator[None]:
        """Around one call.

        Raises:
            RateLimited: the caller is above a limit; says which and when to come back.
        """
        began_s = clock()
        meter = self._meter(caller, own or self._default, began_s)
        meter.begin(caller, began_s)
        try:
            yield
        finally:
            meter.end(clock() - began_s)

    def _meter(self, caller: str, limits: CallLimits, now_s: float) -> _Meter:
        meter = self._meters.get(caller)
        if meter is None:
            if len(self._meters) >= _MAX_CALLERS:
                self._forget_idle(now_s)
            meter = self._meters[caller] = _Meter(limits, now_s)
        meter.limits = limits  # they may have changed with the file of tokens
        return meter

    def _forget_idle(self, now_s: float) -> None:
        idle = [name for name, meter in self._meters.items() if meter.is_idle(now_s)]
        for name in idle:
            del self._meters[name]


def _limited(caller: str, what: str, retry_after_s: float) -> RateLimited:
    wait_s = max(0.001, round(retry_after_s, 3))
    return RateLimited(
        f"{caller}: above its limit of {what}; try again in {wait_s:g} s",
        caller=caller,
        limit=what,
    ).after(wait_s)
