"""How evenly the replicas of a placement can share expected loads: the dispatch solved anew. Pure.

"min T: the load of each expert on its holders, replica g at most T * speed of g" is a linear
program (DeepSeek's LPLB), and for a given T a maximum flow from experts to replicas. A flow that
falls short leaves a set of full replicas whose experts can go nowhere else; what those replicas
have to do over their speeds is a larger T, with which the flow is tried again (Dinkelbach's method,
"On nonlinear fractional programming", 1967). Few steps end at the smallest T there is.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from expertmesh.router.placement import Placement

_TINY_FRAC = 1e-9


class Balance(NamedTuple):
    """What is left of an imbalance when only dispatch may change."""

    time: float
    """Of the replica that takes longest: load over speed."""
    mean: float
    """Of all loads over all speeds: no dispatch is faster."""
    levels: list[float]
    """Load of each replica."""

    @property
    def ratio(self) -> float:
        """Longest over mean; 1 is perfect."""
        return self.time / self.mean if self.mean else 1.0


class Poured(NamedTuple):
    """Loads poured into replicas that may take a given time."""

    overflow: float
    """Load that found no room."""
    levels: list[float]
    """Load of each replica, its part of the overflow apart."""
    tight: frozenset[int]
    """Replicas that are full and whose experts have nowhere else to go."""


def balance(loads: Sequence[float], speeds: Sequence[float], placement: Placement) -> Balance:
    """The best that dispatch can do with a placement.

    Args:
        loads: of each expert, in any unit, 0 or more.
        speeds: of each replica: load it can take in a unit of time, above 0.
        placement: every expert has at least one holder.
    """
    flow = _Flow(loads, speeds, placement)
    mean = sum(loads) / sum(speeds)
    time = max(mean, *(own / speed for own, speed in zip(flow.base, speeds, strict=True)))
    while True:
        poured = flow.pour(time)
        longer = flow.time_of(poured.tight)
        if not poured.tight or longer <= time * (1 + _TINY_FRAC):
            return Balance(time, mean, poured.levels)
        time = longer


def pour(
    loads: Sequence[float], speeds: Sequence[float], placement: Placement, time: float
) -> Poured:
    """As much load as possible within a time; arguments as `balance`."""
    return _Flow(loads, speeds, placement).pour(time)


class _Flow:
    def __init__(
        self, loads: Sequence[float], speeds: Sequence[float], placement: Placement
    ) -> None:
        self._loads, self._speeds, self._placement = loads, speeds, placement
        self._tiny = _TINY_FRAC * (sum(loads) or 1.0)
        self.base = [0.0] * len(speeds)
        """Load of the experts that only this replica holds."""
        shared = [expert for expert, own in enumerate(placement) if len(own) > 1]
        self._shared = sorted(shared, key=lambda expert: (len(placement[expert]), -loads[expert]))
        self._on: list[list[int]] = [[] for _ in speeds]
        """Shared experts of each replica."""
        for expert, holders in enumerate(placement):
            if len(holders) == 1:
                self.base[holders[0]] += loads[expert]
            else:
                for own in holders:
                    self._on[own].append(expert)
        self._room: list[float] = []
        self._given: list[dict[int, float]] = []
        """replica -> shared expert -> its load there."""

    def pour(self, time: float) -> Poured:
        limits = [time * speed for speed in self._speeds]
        self._room = [limit - own for limit, own in zip(limits, self.base, strict=True)]
        tight = {own for own, room in enumerate(self._room) if room < -self._tiny}
        overflow = -sum(self._room[own] for own in tight)
        self._room = [max(0.0, room) for room in self._room]
        self._given = [{} for _ in self._speeds]
        for expert in self._shared:
            left = self._give(expert, self._loads[expert])
            while left > self._tiny:
                path = self._path(self._placement[expert])
                if path[-1][1] < 0:  # nowhere: what was reached is full
                    overflow += left
                    tight.update(own for _, own in path[:-1])
                    break
                left -= self._shift(expert, left, path)
        levels = [limit - room for limit, room in zip(limits, self._room, strict=True)]
        return Poured(overflow, levels, frozenset(self._closed(tight)))

    def _give(self, expert: int, left: float) -> float:
        """To its own holders while they have room, the roomiest first; what is left."""
        for own in sorted(self._placement[expert], key=lambda own: -self._room[own]):
            part = min(left, self._room[own])
            if part > 0:
                self._room[own] -= part
                self._given[own][expert] = self._given[own].get(expert, 0.0) + part
                left -= part
        return left

    def _path(self, start: Sequence[int]) -> list[tuple[int, int]]:
        """The shortest way from full replicas to one with room: [(expert shifted, to replica)].

        If there is none, everything reached, and -1 for a replica at the end.
        """
        came: dict[int, tuple[int, int]] = dict.fromkeys(start, (-1, -1))
        ahead = deque(start)
        while ahead:
            own = ahead.popleft()
            if self._room[own] > self._tiny:
                return self._way(own, came)
            for expert, part in self._given[own].items():
                if part > self._tiny:
                    for other in self._placement[expert]:
                        if other not in came:
                            came[other] = expert, own
                            ahead.append(other)
        return [*((-1, own) for own in came), (-1, -1)]

    @staticmethod
    def _way(end: int, came: dict[int, tuple[int, int]]) -> list[tuple[int, int]]:
        way, own = [], end
        while own >= 0:
            expert, before = came[own]
            way.append((expert, own))
            own = before
        return way[::-1]

    def _shift(self, expert: int, left: float, path: list[tuple[int, int]]) -> float:
        """Hand load along a path, so that its first replica takes some of the expert; how much."""
        owns = [own for _, own in path]
        handed = [moved for moved, _ in path[1:]]
        part = min(left, self._room[owns[-1]])
        for own, moved in zip(owns, handed, strict=False):
            part = min(part, self._given[own][moved])
        self._room[owns[-1]] -= part
        for own, moved, after in zip(owns, handed, owns[1:], strict=False):
            self._given[own][moved] -= part
            self._given[after][moved] = self._given[after].get(moved, 0.0) + part
        self._given[owns[0]][expert] = self._given[owns[0]].get(expert, 0.0) + part
        return part

    def _closed(self, tight: set[int]) -> set[int]:
        """With all that the experts there could go to: full as well."""
        ahead = deque(tight)
        while ahead:
            for expert, part in self._given[ahead.popleft()].items():
                if part > self._tiny:
                    new = set(self._placement[expert]) - tight
                    tight |= new
                    ahead.extend(new)
        return tight

    def time_of(self, tight: frozenset[int]) -> float:
        """What these replicas take for all that nobody else can do."""
        if not tight:
            return 0.0
        work = sum(self.base[own] for own in tight)
        bound = {e for own in tight for e in self._on[own] if tight.issuperset(self._placement[e])}
        work += sum(self._loads[expert] for expert in bound)
        return work / sum(self._speeds[own] for own in tight)
