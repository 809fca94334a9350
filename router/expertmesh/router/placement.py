"""Which replicas hold copies of which experts of a layer, so that live dispatch can balance. Pure.

The replicas form a ring, and every expert with several copies lies on neighbours of it, the next
one beginning where the last one ended. Rows can then be moved from any replica to any other by way
of the shared experts between them: the "long chain" of Jordan and Graves ("Principles on the
Benefits of Manufacturing Process Flexibility", 1995), which balances nearly as well as if every
replica held everything. What is left, the experts with one copy, is packed by longest first.

How many copies an expert gets is DeepSeek's rule (EPLB's `replicate_experts`): one each, then
another one to whoever has the largest load per copy; but for loads drawn a little to their mean, as
tomorrow's hot experts are others.
"""

import heapq
from collections.abc import Sequence
from itertools import count

from expertmesh.runtime.errors import InvalidInput

DRAWN_TO_MEAN = 0.5
"""How far loads are drawn to their mean before copies are given out."""

Placement = list[list[int]]
"""expert -> the replicas that hold it."""


def plan_placement(
    loads: Sequence[float], speeds: Sequence[float], slots: Sequence[int]
) -> Placement:
    """A placement that uses every slot it can use.

    Args:
        loads: of each expert, in any unit, 0 or more.
        speeds: of each replica: load it can take in a unit of time, above 0.
        slots: experts that each replica has room for.

    Raises:
        InvalidInput: fewer slots than experts.
    """
    if sum(slots) < len(loads):
        raise InvalidInput.of(
            "slots", expected=f"room for {len(loads)} experts", got=f"{sum(slots)} slots"
        )
    copies = _copies(loads, sum(slots), len(speeds))
    free = list(slots)
    placement: Placement = [[] for _ in loads]
    by_load = sorted(range(len(loads)), key=lambda expert: -loads[expert])
    _chain([expert for expert in by_load if copies[expert] > 1], copies, free, placement)
    level = _levels(loads, speeds, placement)
    for expert in by_load:
        if not placement[expert]:
            best = min(
                (own for own, room in enumerate(free) if room),
                key=lambda own: level[own] + loads[expert] / speeds[own],
            )
            placement[expert].append(best)
            level[best] += loads[expert] / speeds[best]
            free[best] -= 1
    return placement


def _copies(loads: Sequence[float], num_slots: int, num_replicas: int) -> list[int]:
    copies = [1] * len(loads)
    if num_replicas == 1:
        return copies
    spread = DRAWN_TO_MEAN * sum(loads) / len(loads)
    largest = [(-load - spread, expert) for expert, load in enumerate(loads)]
    heapq.heapify(largest)
    for _ in range(min(num_slots - len(loads), len(loads) * (num_replicas - 1))):
        _, expert = heapq.heappop(largest)
        copies[expert] += 1
        if copies[expert] < num_replicas:
            heapq.heappush(largest, (-(loads[expert] + spread) / copies[expert], expert))
    return copies


def _chain(
    shared: Sequence[int], copies: Sequence[int], free: list[int], placement: Placement
) -> None:
    """Lay the shared experts around the ring of replicas that have room."""
    last = 0
    for expert in shared:
        for place in count(last):
            own = place % len(free)
            if free[own] and own not in placement[expert]:
                placement[expert].append(own)
                free[own] -= 1
                last = place
            if len(placement[expert]) == copies[expert] or place - last > len(free):
                break


def _levels(loads: Sequence[float], speeds: Sequence[float], placement: Placement) -> list[float]:
    """Time each replica takes if every copy works as long as the others of its expert."""
    level = [0.0] * len(speeds)
    for expert, holders in enumerate(placement):
        together = sum(speeds[own] for own in holders)
        for own in holders:
            level[own] += loads[expert] / together
    return level


def lower_bound(loads: Sequence[float], speeds: Sequence[float], num_slots: int) -> float:
    """No placement in that many slots and no dispatch gets the longest time below this.

    The m hottest experts have at most m + R copies, R being the spare slots, so at most that many
    replicas work for them.
    """
    spare = num_slots - len(loads)
    hottest, fastest = sorted(loads, reverse=True), sorted(speeds, reverse=True)
    bound = sum(loads) / sum(speeds)
    together = 0.0
    for number, load in enumerate(hottest, 1):
        together += load
        bound = max(bound, together / sum(fastest[: number + spare]))
    return bound
