"""How much of each replica's memory every layer gets, in experts. Pure.

First every expert gets one place, layers in proportion over the replicas. Then what is left goes,
copy by copy, to the layer where another copy takes the largest part of the layer's rows off its
hottest expert, per byte (CRAFT, arXiv 2603.28768, spends memory by marginal benefit too). A layer
with a copy less than replicas to spare can be balanced whatever its loads are, by filling replicas
one after the other; so all layers get that many before any gets more. As in `placement.py`, loads
count drawn a little to their mean.
"""

import heapq
from collections.abc import Mapping, Sequence

from expertmesh.router.placement import DRAWN_TO_MEAN
from expertmesh.runtime.errors import InsufficientMemory

Slots = dict[int, list[int]]
"""layer -> experts of it that each replica has room for"""


def share_slots(
    rooms: Sequence[int], expert_bytes: Mapping[int, int], loads: Mapping[int, Sequence[float]]
) -> Slots:
    """Places for experts under every replica's budget.

    Args:
        rooms: bytes of each replica.
        expert_bytes: layer -> bytes of one expert.
        loads: layer -> load of each expert, in any unit.

    Raises:
        InsufficientMemory: some expert has no place; says how many bytes are missing.
    """
    memory = _Memory(rooms, expert_bytes, {layer: len(own) for layer, own in loads.items()})
    for layer in sorted(loads, key=lambda layer: -expert_bytes[layer]):
        memory.give_in_proportion(layer)
    for layer in sorted(loads, key=lambda layer: -expert_bytes[layer]):
        memory.complete(layer)
    _give_copies(memory, expert_bytes, loads)
    return memory.slots


class _Memory:
    """Bytes left, and slots given."""

    def __init__(
        self, rooms: Sequence[int], expert_bytes: Mapping[int, int], num_experts: Mapping[int, int]
    ) -> None:
        self._rooms, self._bytes, self._num = rooms, expert_bytes, num_experts
        self._free = list(rooms)
        self._needed = sum(expert_bytes[layer] * num for layer, num in num_experts.items())
        self.slots: Slots = {layer: [0] * len(rooms) for layer in num_experts}

    def give_in_proportion(self, layer: int) -> None:
        """To each replica its share of the layer by its share of all memory, rounded down."""
        total = max(sum(self._rooms), 1)
        for own, room in enumerate(self._rooms):
            share = self._num[layer] * room // total
            self.slots[layer][own] = min(share, self._free[own] // self._bytes[layer])
            self._free[own] -= self.slots[layer][own] * self._bytes[layer]

    def complete(self, layer: int) -> None:
        """Until there is a place for every expert of the layer."""
        while sum(self.slots[layer]) < self._num[layer]:
            if not self.give(layer):
                self._fail(layer)

    def give(self, layer: int) -> bool:
        """Another slot, where most is free; False if there is no room."""
        able = (
            own
            for own, free in enumerate(self._free)
            if free >= self._bytes[layer] and self.slots[layer][own] < self._num[layer]
        )
        best = max(able, key=lambda own: self._free[own], default=-1)
        if best >= 0:
            self.slots[layer][best] += 1
            self._free[best] -= self._bytes[layer]
        return best >= 0

    def _fail(self, layer: int) -> None:
        available = sum(self._rooms)
        missing = self._needed - available
        if missing > 0:
            message = (
                f"the experts need {self._needed} bytes, the {len(self._rooms)} replicas have "
                f"{available} for them: {missing} bytes are missing"
            )
        else:
            missing = self._bytes[layer] - max(self._free)
            message = (
                f"an expert of layer {layer} needs {self._bytes[layer]} bytes, and no replica has "
                f"more than {max(self._free)} left: {missing} bytes are missing"
            )
        raise InsufficientMemory(
            message, layer=layer, needed_bytes=self._needed, missing_bytes=missing
        )


def _give_copies(
    memory: _Memory, expert_bytes: Mapping[int, int], loads: Mapping[int, Sequence[float]]
) -> None:
    """Spend what is left, layer by layer, by what the next copy brings."""
    num_replicas = len(next(iter(memory.slots.values())))
    queues = {
        layer: _Copies(own, sum(memory.slots[layer]), num_replicas) for layer, own in loads.items()
    }

    def rank(layer: int) -> tuple[bool, float, int]:
        num_spare = sum(memory.slots[layer]) - len(loads[layer])
        return num_spare >= num_replicas - 1, -queues[layer].gain() / expert_bytes[layer], layer

    best = [rank(layer) for layer in loads]
    heapq.heapify(best)
    while best:
        _, gain, layer = heapq.heappop(best)
        if gain and memory.give(layer):
            queues[layer].add()
            heapq.heappush(best, rank(layer))


class _Copies:
    """The next expert of a layer to get a copy."""

    def __init__(self, loads: Sequence[float], num_slots: int, num_replicas: int) -> None:
        total = sum(loads) or 1.0
        spread = DRAWN_TO_MEAN / len(loads)
        self._most = num_replicas
        each = [(-(load / total + spread), 1, expert) for expert, load in enumerate(loads)]
        self._heap = each if num_replicas > 1 else []
        """(load per copy, negative, copies, expert) of those that not every replica holds."""
        heapq.heapify(self._heap)
        for _ in range(num_slots - len(loads)):
            self.add()

    def gain(self) -> float:
        """Share of the layer's rows that another copy takes off its expert."""
        if not self._heap:
            return 0.0
        each, copies, _ = self._heap[0]
        return -each / (copies + 1)

    def add(self) -> None:
        """Give it."""
        if self._heap:
            each, copies, expert = heapq.heappop(self._heap)
            if copies + 1 < self._most:
                heapq.heappush(self._heap, (each * copies / (copies + 1), copies + 1, expert))
