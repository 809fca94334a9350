"""Loading one expert: who fills its slot, how it may end, and what is counted of it."""

from collections.abc import Callable
from dataclasses import dataclass

from expertmesh.experts.residency import ExpertKey
from expertmesh.experts.stack import ExpertStack
from expertmesh.runtime.errors import ExpertMeshError, WeightsUnavailable

_EWMA_WEIGHT = 0.1

IsCancelled = Callable[[], bool]
Fill = Callable[[ExpertKey, ExpertStack, IsCancelled], None]
"""Gives a slot all weights of an expert, or raises: Cancelled once it is cancelled."""


class Cancelled(Exception):
    """The weights turned out not to be needed; the slot is not full."""


@dataclass
class LoadCounts:
    """What the loader has done since it started."""

    hits: int = 0
    """Uses that found the weights on the device."""
    misses: int = 0
    """Uses that had to wait for them."""
    loads: int = 0
    evictions: int = 0
    prefetches: int = 0
    """Loads nobody waited for when they began."""
    cancelled: int = 0
    """Prefetches given up because they were wrong."""
    failed: int = 0
    load_time_us: float = 0.0
    """Exponentially weighted mean."""

    def observe_load(self, took_s: float) -> None:
        """Account one finished load."""
        weight = _EWMA_WEIGHT if self.loads else 1.0
        self.load_time_us += weight * (took_s * 1e6 - self.load_time_us)
        self.loads += 1


def unavailable(key: ExpertKey, error: Exception) -> WeightsUnavailable:
    """What those are told who wait for an expert that could not be loaded."""
    reason = error.message if isinstance(error, ExpertMeshError) else type(error).__name__
    return WeightsUnavailable(
        f"layer {key.layer}, expert {key.expert}: its weights could not be brought to the device: "
        f"{reason} Ask another replica, or retry; the cause is in the replica's log.",
        layer=key.layer,
        expert=key.expert,
    )
