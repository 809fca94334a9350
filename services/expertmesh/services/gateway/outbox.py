"""What steps bring, on its way from the model's thread to the event loop."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from expertmesh.services.gateway.schedule import Generation


@dataclass(frozen=True)
class Outcome:
    """What a step has brought a generation."""

    generation: Generation
    token: int | None = None
    is_last: bool = False
    error: Exception | None = None

    @property
    def is_urgent(self) -> bool:
        """Whether somebody waits for it: the first token, the end, or text that may be the end."""
        request = self.generation.request
        is_first = len(self.generation.tokens) == len(request.prompt) + 1
        return self.is_last or is_first or bool(request.stop)


class Outbox:
    """Hands on outcomes: urgent ones at once, others together after a while.

    Waking the event loop and writing a message per request take longer than a small model's step.

    Args:
        interval_s: outcomes wait so long at most while steps go on.
        deliver: gets the outcomes of one or more steps, in their order.
    """

    def __init__(
        self,
        interval_s: float,
        deliver: Callable[[list[Outcome]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval_s = interval_s
        self._deliver = deliver
        self._clock = clock
        self._held: list[Outcome] = []
        self._delivered_s = clock()

    def put(self, outcomes: Sequence[Outcome]) -> None:
        """Those of a step."""
        self._held += outcomes
        is_due = self._clock() - self._delivered_s >= self._interval_s
        if is_due or any(outcome.is_urgent for outcome in outcomes):
            self.flush()

    def flush(self) -> None:
        """Hand on all at once."""
        if self._held:
            held, self._held = self._held, []
            self._delivered_s = self._clock()
            self._deliver(held)
