"""How soon a router asks another replica, and how often. Pure."""

from pydantic import Field, NonNegativeInt, PositiveFloat

from expertmesh.runtime.config import Settings


class FailoverSettings(Settings):
    """What a router does about replicas that are slow or silent (docs/failures.md)."""

    hedge_frac: float = Field(default=0.05, ge=0, le=1)
    """Messages that may be sent to a second copy because the first is late, as a share of all; 0
    never asks twice before a replica has failed or fallen silent."""
    hedge_burst: NonNegativeInt = 16
    """Such messages that may be sent at once after a time without any."""
    silent_s: PositiveFloat = 0.25
    """A replica that has been asked and has said nothing for that long, and for four times as long
    as such answers take, gets no work until it answers a probe."""


class HedgeBudget:
    """A token bucket: every message earns a share of a hedge."""

    def __init__(self, settings: FailoverSettings) -> None:
        self._frac = settings.hedge_frac
        self._most = float(settings.hedge_burst) if settings.hedge_frac else 0.0
        self._tokens = 0.0

    def earn(self, num_messages: int) -> None:
        """That many messages were sent for the first time."""
        self._tokens = min(self._most, self._tokens + self._frac * num_messages)

    def spend(self, num_messages: int) -> bool:
        """Whether that many may be sent again."""
        if self._tokens < num_messages:
            return False
        self._tokens -= num_messages
        return True
