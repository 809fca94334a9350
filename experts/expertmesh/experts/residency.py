"""Which experts' weights a device holds under a budget of bytes, and which one leaves for another.

Pure: no tensors, no I/O; time is passed in, counted in uses of experts. Whoever moves weights asks
here first and tells here afterwards.
"""

import heapq
import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

HALF_LIFE_PER_EXPERT = 2.0
"""Popularity halves within so many uses for each expert there is: a few tokens. A text of another
kind soon has its experts there, however fast the model is, and idling forgets nothing."""


class ExpertKey(NamedTuple):
    """An expert of the model."""

    layer: int
    expert: int


class _Worth(NamedTuple):
    """What decides who leaves: the least popular, and among equals the least recently used."""

    log_popularity: float = -math.inf
    """log2 of the uses, each halved per half-life, as if seen from time 0: popularities all decay
    alike, so their order in this form does not depend on when one looks."""
    used: float = -math.inf


class Residency:
    """Accounting of one device. Not thread-safe.

    An expert is absent, loading or resident; its bytes count from the moment it starts to load. It
    is evicted only while it is resident and nobody has pinned it. A pin may be set before the
    weights are there: it keeps them once they come.

    Args:
        sizes: bytes that each expert takes on the device.
        budget_bytes: at least the largest of them.
        half_life: uses, of any experts, in which popularity halves; by default in proportion to the
            number of experts.
    """

    def __init__(
        self,
        sizes: Mapping[ExpertKey, int],
        budget_bytes: int,
        half_life: float | None = None,
    ) -> None:
        assert budget_bytes >= max(sizes.values()), "the budget must hold any one expert"
        self._sizes = sizes
        self._half_life = half_life or HALF_LIFE_PER_EXPERT * len(sizes)
        self._worth = dict.fromkeys(sizes, _Worth())
        self._pins: Counter[ExpertKey] = Counter()
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        """Of experts resident or loading; not above the budget, unless that was lowered."""
        self.resident: set[ExpertKey] = set()
        self.loading: set[ExpertKey] = set()

    @property
    def largest_bytes(self) -> int:
        """Of one expert: what a budget must hold."""
        return max(self._sizes.values())

    def set_budget(self, budget_bytes: int, keep: Collection[ExpertKey] = ()) -> list[ExpertKey]:
        """Change the budget. Returns the experts that were evicted for it. Those that are pinned,
        loading or kept stay, if need be above it, until something is loaded later.

        Args:
            budget_bytes: at least `largest_bytes`.
        """
        assert budget_bytes >= self.largest_bytes, "the budget must hold any one expert"
        self.budget_bytes = budget_bytes
        evicted: list[ExpertKey] = []
        while self.used_bytes > budget_bytes and (victim := self.evict_one(keep)):
            evicted.append(victim)
        return evicted

    @property
    def pinned(self) -> set[ExpertKey]:
        """Experts somebody uses or waits for."""
        return set(self._pins)

    def popularity(self, key: ExpertKey, now: float) -> float:
        """Uses of an expert, each halved for every half-life that has passed since."""
        return float(2.0 ** (self._worth[key].log_popularity - now / self._half_life))

    def use(self, key: ExpertKey, now: float) -> bool:
        """Count one use. Returns whether the weights were resident."""
        uses = self.popularity(key, now) + 1
        self._worth[key] = _Worth(math.log2(uses) + now / self._half_life, now)
        return key in self.resident

    def favourite(self) -> ExpertKey | None:
        """The most popular of the resident experts."""
        return max(self.resident, key=self._order, default=None)

    def pin(self, key: ExpertKey) -> None:
        """Keep it from eviction, now or once it is there, until as many `unpin`."""
        self._pins[key] += 1

    def unpin(self, key: ExpertKey) -> None:
        """Take one pin back."""
        assert self._pins[key] > 0, f"{key} is not pinned"
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]

    def start_load(
        self, key: ExpertKey, keep: Collection[ExpertKey] = ()
    ) -> list[ExpertKey] | None:
        """Evict what is in the way of an absent expert and count it as loading.

        Args:
            keep: experts that must not leave for it, besides the pinned ones.

        Returns:
            The experts evicted; None, and nothing changes, if what may leave is not enough.
        """
        assert key not in self.resident | self.loading, f"{key} is not absent"
        evicted: list[ExpertKey] = []
        free_bytes = self.budget_bytes - self.used_bytes
        movable = self._movable(keep) if free_bytes < self._sizes[key] else []
        while free_bytes < self._sizes[key]:
            if not movable:
                return None
            evicted.append(heapq.heappop(movable)[-1])
            free_bytes += self._sizes[evicted[-1]]
        for victim in evicted:
            self._leave(victim)
        self.loading.add(key)
        self.used_bytes += self._sizes[key]
        return evicted

    def evict_one(self, keep: Collection[ExpertKey] = ()) -> ExpertKey | None:
        """Evict the least worth; None if nothing may leave."""
        movable = self._movable(keep)
        if not movable:
            return None
        self._leave(movable[0][-1])
        return movable[0][-1]

    def loaded(self, key: ExpertKey) -> None:
        """The weights are all there."""
        self.loading.remove(key)
        self.resident.add(key)

    def not_loaded(self, key: ExpertKey) -> None:
        """The load was given up."""
        self.loading.remove(key)
        self.used_bytes -= self._sizes[key]

    def _leave(self, key: ExpertKey) -> None:
        self.resident.remove(key)
        self.used_bytes -= self._sizes[key]

    def _movable(self, keep: Collection[ExpertKey]) -> list[tuple[_Worth, ExpertKey]]:
        """What may leave, as a heap with the least worth first."""
        movable = [self._order(k) for k in self.resident if k not in self._pins and k not in keep]
        heapq.heapify(movable)
        return movable

    def _order(self, key: ExpertKey) -> tuple[_Worth, ExpertKey]:
        return self._worth[key], key
