"""The calls that a gateway works on: a forward of its engine belongs to all of them."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from expertmesh.runtime.origin import Origin, Priority

_SEVERAL = "gateway"


class RunningCalls:
    """Their traces, and whose they are."""

    def __init__(self) -> None:
        self._keys = itertools.count()
        self._traces: dict[int, str] = {}
        self._origins: dict[int, Origin] = {}

    @contextmanager
    def holding(self, origin: Origin, traceparent: str) -> Iterator[None]:
        """While a call runs.

        Args:
            traceparent: of its span, or "".
        """
        key = next(self._keys)
        self._origins[key] = origin
        if traceparent:
            self._traces[key] = traceparent
        try:
            yield
        finally:
            del self._origins[key]
            self._traces.pop(key, None)

    def traceparents(self) -> tuple[str, ...]:
        """Of all of them."""
        return tuple(self._traces.values())

    def origin(self) -> Origin:
        """Whose a forward is: of the only caller, else of all; as urgent as the most urgent call.

        Called from the engine's thread.
        """
        running = set(self._origins.copy().values())
        if len(running) == 1:
            return running.pop()
        callers = {own.caller for own in running}
        priority = min((own.priority for own in running), default=Priority.INTERACTIVE)
        return Origin(callers.pop() if len(callers) == 1 else _SEVERAL, priority)
