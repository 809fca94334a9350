"""What came out of a simulation."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from expertmesh.services.simulator.arrivals import Arrivals
from expertmesh.services.simulator.fleet import Fleet

Floats = NDArray[np.float64]


@dataclass
class Series:
    """The mesh over time."""

    at_s: list[float] = field(default_factory=list)
    ready: list[list[int]] = field(default_factory=list)
    """Ready replicas of each group."""
    starting: list[int] = field(default_factory=list)
    waiting_tokens: list[float] = field(default_factory=list)
    """Of prompts, at the gateways."""
    tokens: list[float] = field(default_factory=list)
    """Passed through the model since the simulation began."""
    busy_s: list[list[float]] = field(default_factory=list)
    """Seconds that replicas of each group have computed since the simulation began."""

    def look(self, now_s: float, fleet: Fleet, waiting: float, tokens: float) -> None:
        """Add a moment."""
        ready = [len(fleet.ready(group)) for group in range(fleet.num_groups)]
        present = [fleet.present(group) for group in range(fleet.num_groups)]
        self.at_s.append(now_s)
        self.ready.append(ready)
        self.starting.append(sum(present) - sum(ready))
        self.waiting_tokens.append(waiting)
        self.tokens.append(tokens)
        self.busy_s.append(fleet.computed_s_by_group())


@dataclass
class Outcome:
    """Times of every request, and what they cost."""

    arrivals: Arrivals
    ttft_s: Floats
    """From arrival to the first token; infinite if there never was one."""
    latency_s: Floats
    """From arrival to the last token; infinite if the request failed."""
    series: Series
    gpu_s: float
    end_s: float
    """When the last request was done."""
    tokens: float
    """That passed through the model."""
    rows: float
    """Computed by replicas."""
    planned_calls: int
    """Layer calls that went through the router's code."""
    imbalance: float
    """Mean over planned calls of the slowest replica's time over the mean of all that are ready."""
    changes: int
    """Times that a group was resized."""
    lost: int
    """Replicas that died."""

    @property
    def failed(self) -> int:
        """Requests that did not get all of their answer."""
        return int(np.isinf(self.latency_s).sum())


def percentile(values: Floats, frac: float) -> float:
    """The value below which `frac` of the values lie (nearest rank); infinite ones count."""
    if not len(values):
        return 0.0
    place = min(len(values) - 1, int(np.ceil(frac * len(values))) - 1)
    return float(np.partition(values, place)[place])


def token_gaps_s(outcome: Outcome) -> Floats:
    """Mean time between two tokens, of every request that was answered and has several."""
    several = np.isfinite(outcome.latency_s) & (outcome.arrivals.generated > 1)
    took_s = outcome.latency_s[several] - outcome.ttft_s[several]
    gaps: Floats = took_s / (outcome.arrivals.generated[several] - 1)
    return gaps
