"""Few moves of copies that help most, one after the other. Pure.

What a placement cannot do within a goal time, however its rows are shared (`balance.pour`), is its
overflow. A move is good by how much overflow it takes away for the bytes it loads. Live moves add a
copy where there is room, or where one that is not needed made some: anything else would give up the
last copy of an expert for a while. On paper two experts may change places as well.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from expertmesh.router.balance import Poured, pour
from expertmesh.router.placement import Placement

_MOST_EXPERTS = 8
_MOST_TARGETS = 6
_MOST_TARGETS_ON_PAPER = 2  # more moves are no harm there, and each is found sooner
_MOST_VICTIMS = 4
_MOST_HANDED_ON = 2
_LEAST_GAIN_FRAC = 1e-4
"""Share of a layer's rows: less is not worth a load."""


class Step(NamedTuple):
    """One change of what a replica holds."""

    kind: Literal["add", "drop"]
    layer: int
    expert: int
    replica: int


@dataclass(frozen=True)
class Move:
    """Steps in their order. After each of them every expert has a ready copy."""

    steps: tuple[Step, ...]
    gain_frac: float
    """Share of the layer's rows that found no room within the goal before and does now."""
    num_bytes: int
    """Of the weights that are loaded for it."""


@dataclass
class Holdings:
    """Which replica holds what, and what it has room for."""

    placement: dict[int, Placement]
    """Layer -> ready copies."""
    free_bytes: list[int]
    """Of each replica, for more weights."""
    expert_bytes: Mapping[int, int]
    """Layer -> bytes of one expert."""
    nodes: Sequence[str]
    """Where each replica runs."""
    pinned: frozenset[tuple[int, int, int]] = frozenset()
    """(layer, expert, replica) of copies that stay."""

    def copy(self) -> "Holdings":
        """To try steps on."""
        placement = {layer: [list(own) for own in found] for layer, found in self.placement.items()}
        free_bytes = list(self.free_bytes)
        return Holdings(placement, free_bytes, self.expert_bytes, self.nodes, self.pinned)

    def apply(self, steps: Sequence[Step]) -> None:
        """As if they had been done."""
        for step in steps:
            holders = self.placement[step.layer][step.expert]
            if step.kind == "add":
                holders.append(step.replica)
                self.free_bytes[step.replica] -= self.expert_bytes[step.layer]
            else:
                holders.remove(step.replica)
                self.free_bytes[step.replica] += self.expert_bytes[step.layer]

    def num_nodes(self, layer: int, expert: int, without: int = -1) -> int:
        """Distinct nodes on which an expert has copies."""
        holders = self.placement[layer][expert]
        return len({self.nodes[own] for own in holders if own != without})

    def may_drop(self, layer: int, expert: int, replica: int, min_copies: int) -> bool:
        """Whether enough copies on distinct nodes are left without this one."""
        if (layer, expert, replica) in self.pinned:
            return False
        return self.num_nodes(layer, expert, replica) >= max(1, min_copies)

    def ways_in(
        self, layer: int, replica: int, loads: Sequence[float], min_copies: int
    ) -> Iterator[tuple[Step, ...]]:
        """What makes room for another expert of the layer on a replica: nothing; dropping one of
        the least loaded copies that are not needed; or, if there is none, handing a cold expert to
        a replica that has one to drop."""
        if self.free_bytes[replica] >= self.expert_bytes[layer]:
            yield ()
            return
        not_needed = self._not_needed(layer, loads, min_copies)
        victims = [expert for expert, own in not_needed if own == replica]
        for victim in victims[:_MOST_VICTIMS]:
            yield (Step("drop", layer, victim, replica),)
        if victims:
            return
        placement = self.placement[layer]
        cold = [
            expert
            for expert, holders in enumerate(placement)
            if replica in holders and (layer, expert, replica) not in self.pinned
        ]
        for expert in sorted(cold, key=lambda expert: loads[expert])[:_MOST_HANDED_ON]:
            others = [pair for pair in not_needed if pair[1] not in placement[expert]]
            for victim, other in others[:_MOST_HANDED_ON]:
                yield (
                    Step("drop", layer, victim, other),
                    Step("add", layer, expert, other),
                    Step("drop", layer, expert, replica),
                )

    def _not_needed(
        self, layer: int, loads: Sequence[float], min_copies: int
    ) -> list[tuple[int, int]]:
        """(expert, replica) of copies that may be dropped, the least loaded first."""
        found = [
            (expert, own)
            for expert, holders in enumerate(self.placement[layer])
            if len(holders) > 1
            for own in holders
            if self.may_drop(layer, expert, own, min_copies)
        ]
        return sorted(found, key=lambda pair: loads[pair[0]])


@dataclass(frozen=True)
class Goal:
    """How evenly a layer should be loaded."""

    loads: Sequence[float]
    """Of each expert."""
    speeds: Sequence[float]
    """Of each replica."""
    time: float
    """Of the replica that takes longest."""
    min_copies: int = 1
    """Of each expert, on distinct nodes."""
    is_live: bool = True
    """Whether every expert keeps a ready copy all the time."""


def best_move(layer: int, goal: Goal, holdings: Holdings) -> Move | None:
    """The move that brings the layer nearest to its goal for its bytes; None if none helps."""
    placement = holdings.placement[layer]
    before = pour(goal.loads, goal.speeds, placement, goal.time)
    total = sum(goal.loads)
    if before.overflow <= _LEAST_GAIN_FRAC * total:
        return None
    best, most = None, 0.0
    for steps in _candidates(layer, goal, holdings, before):
        after = pour(goal.loads, goal.speeds, _after(placement, steps), goal.time)
        gain_frac = (before.overflow - after.overflow) / total
        num_bytes = holdings.expert_bytes[layer] * sum(step.kind == "add" for step in steps)
        if gain_frac >= _LEAST_GAIN_FRAC and gain_frac / num_bytes > most:
            best, most = Move(steps, gain_frac, num_bytes), gain_frac / num_bytes
    return best


def _candidates(
    layer: int, goal: Goal, holdings: Holdings, before: Poured
) -> Iterator[tuple[Step, ...]]:
    """Ways to let an expert that is bound to full replicas work elsewhere as well."""
    placement = holdings.placement[layer]
    bound = [e for e, holders in enumerate(placement) if before.tight.issuperset(holders)]
    bound.sort(key=lambda expert: -goal.loads[expert])
    room = {
        own: goal.time * speed - before.levels[own]
        for own, speed in enumerate(goal.speeds)
        if own not in before.tight
    }
    most = _MOST_TARGETS if goal.is_live else _MOST_TARGETS_ON_PAPER
    num_tried = 0
    for target in sorted(room, key=lambda own: -room[own]):
        ways = list(holdings.ways_in(layer, target, goal.loads, goal.min_copies))
        for expert in bound[:_MOST_EXPERTS]:
            for way in ways:
                yield (*way, Step("add", layer, expert, target))
        if not goal.is_live:
            yield from _swaps(layer, goal, placement, bound, target, room[target])
        num_tried += bool(ways) or not goal.is_live
        if num_tried == most:
            return


def _swaps(
    layer: int,
    goal: Goal,
    placement: Placement,
    bound: Sequence[int],
    target: int,
    room: float,
) -> Iterator[tuple[Step, ...]]:
    """An expert of a full replica changes places with one of the target that has less load."""
    pairs = [
        (out, back, source)
        for out in bound
        for source in placement[out]
        for back, holders in enumerate(placement)
        if target in holders and source not in holders and goal.loads[back] < goal.loads[out]
    ]

    def miss(pair: tuple[int, int, int]) -> float:
        return abs(goal.loads[pair[0]] - goal.loads[pair[1]] - room / 2)

    for out, back, source in sorted(pairs, key=miss)[: _MOST_EXPERTS * _MOST_VICTIMS]:
        yield (
            Step("drop", layer, out, source),
            Step("drop", layer, back, target),
            Step("add", layer, out, target),
            Step("add", layer, back, source),
        )


def _after(placement: Placement, steps: Sequence[Step]) -> Placement:
    changed = list(placement)
    for step in steps:
        holders = changed[step.expert]
        changed[step.expert] = (
            [*holders, step.replica]
            if step.kind == "add"
            else [own for own in holders if own != step.replica]
        )
    return changed
