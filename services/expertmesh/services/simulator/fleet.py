"""The virtual replicas of a mesh: started, ready, draining, gone; and what each group measured.

The clock is passed in. Times of replicas are in seconds of the simulation.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from random import Random

from expertmesh.router.pools import Costs
from expertmesh.services.simulator.scenario import StartSettings


class Phase(Enum):
    """Where a replica is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(eq=False, slots=True)
class VirtualReplica:
    """One replica of a group."""

    name: str
    group: int
    base: Costs
    """What batches cost while nothing is wrong."""
    born_s: float
    ready_s: float
    gone_s: float = math.inf
    phase: Phase = Phase.STARTING
    slow_factor: float = 1.0
    paused_until_s: float = 0.0
    rows: float = 0.0
    """Computed since it was born."""
    busy_s: float = 0.0
    is_lost: bool = False
    """Whether it died with whatever it had to do."""

    @property
    def costs(self) -> Costs:
        """What batches cost now."""
        if self.slow_factor == 1:
            return self.base
        return Costs(*(own * self.slow_factor for own in self.base))

    def batch_s(self, num_experts: float, num_rows: float) -> float:
        """Time it takes for a batch."""
        costs = self.costs
        took_us = costs.batch_us + costs.expert_us * num_experts + costs.row_us * num_rows
        return took_us / 1e6


@dataclass(slots=True)
class GroupMeter:
    """What a group's replicas measured since the last look."""

    busy_s: float = 0.0
    came_rows: float = 0.0
    done_rows: float = 0.0
    waited_row_s: float = 0.0
    """Sum over rows of the time each waited for its batch to start."""
    started_rows: float = 0.0


@dataclass
class Fleet:
    """All replicas.

    Args:
        num_groups: of the mesh.
        costs: replicas get these GPUs, one after the other.
        load_s: time a replica takes for the weights of its experts.
    """

    num_groups: int
    costs: Sequence[Costs]
    start: StartSettings
    load_s: float
    random: Random
    on_change: Callable[[VirtualReplica], None] = lambda replica: None
    """Told when a replica has got ready, has begun to drain, or is gone."""
    meters: list[GroupMeter] = field(init=False)
    gpu_s: float = 0.0
    """GPU-seconds of those that are gone."""
    lost: int = 0

    def __post_init__(self) -> None:
        self.meters = [GroupMeter() for _ in range(self.num_groups)]
        self._groups: list[dict[str, VirtualReplica]] = [{} for _ in range(self.num_groups)]
        self._born: list[VirtualReplica] = []
        self._gone_busy_s = [0.0] * self.num_groups
        self._next_s = math.inf

    def __iter__(self) -> Iterator[VirtualReplica]:
        return (replica for own in self._groups for replica in own.values())

    def members(self, group: int, *phases: Phase) -> list[VirtualReplica]:
        """Replicas of a group in one of these phases, oldest first."""
        return [replica for replica in self._groups[group].values() if replica.phase in phases]

    def ready(self, group: int) -> list[VirtualReplica]:
        """Replicas of a group that take work."""
        return self.members(group, Phase.READY)

    def present(self, group: int) -> int:
        """Replicas of a group that take work or will."""
        return len(self.members(group, Phase.READY, Phase.STARTING))

    def add(self, group: int, now_s: float, *, at_once: bool = False) -> VirtualReplica:
        """Start a replica."""
        spread = 1 + self.start.spread_frac * self.random.uniform(-1, 1)
        delay_s = 0.0 if at_once else (self.start.start_s + self.load_s) * spread
        base = self.costs[len(self._born) % len(self.costs)]
        name = f"g{group}#{len(self._born) + 1}"
        replica = VirtualReplica(name, group, base, now_s, now_s + delay_s)
        self._groups[group][name] = replica
        self._born.append(replica)
        self._next_s = min(self._next_s, replica.ready_s)
        if at_once:
            self.advance(now_s)
        return replica

    def resize(self, group: int, wanted: int, now_s: float) -> None:
        """Start or take away replicas until so many are there: those that are starting go first,
        then the youngest ones."""
        for _ in range(wanted - self.present(group)):
            self.add(group, now_s)
        extra = self.present(group) - wanted
        going = self.members(group, Phase.STARTING)[::-1] + self.ready(group)[::-1]
        for replica in going[: max(0, extra)]:
            self.take_away(replica, now_s)

    def take_away(self, replica: VirtualReplica, now_s: float) -> None:
        """Drain a replica; one that has not started is gone at once."""
        was_ready = replica.phase is Phase.READY
        replica.phase = Phase.DRAINING
        replica.gone_s = now_s + (self.start.drain_s if was_ready else 0.0)
        self._next_s = min(self._next_s, replica.gone_s)
        if was_ready:
            self.on_change(replica)

    def kill(self, replica: VirtualReplica, now_s: float) -> None:
        """A replica dies; another one is started in its place."""
        replica.gone_s, replica.is_lost = now_s, True
        self.lost += 1
        self._bury(replica)
        self.add(replica.group, now_s)

    def advance(self, now_s: float) -> None:
        """Replicas get ready and leave as time goes by."""
        if now_s < self._next_s:
            return
        for replica in list(self):
            if replica.phase is Phase.STARTING and replica.ready_s <= now_s:
                replica.phase = Phase.READY
                self.on_change(replica)
            elif replica.phase is Phase.DRAINING and replica.gone_s <= now_s:
                self._bury(replica)

        self._next_s = self._next_change_s()

    @property
    def next_s(self) -> float:
        """When `advance` has something to do next; infinite if nothing is to come."""
        return self._next_s

    def _next_change_s(self) -> float:
        starting = (own.ready_s for own in self if own.phase is Phase.STARTING)
        draining = (own.gone_s for own in self if own.phase is Phase.DRAINING)
        return min((*starting, *draining), default=math.inf)

    def _bury(self, replica: VirtualReplica) -> None:
        replica.phase = Phase.GONE
        del self._groups[replica.group][replica.name]
        self.gpu_s += replica.gone_s - replica.born_s
        self._gone_busy_s[replica.group] += replica.busy_s
        self.on_change(replica)

    def gpu_seconds(self, now_s: float) -> float:
        """GPU-seconds of all replicas until now, from their first second to their last."""
        alive = (min(now_s, own.gone_s) - own.born_s for own in self)
        return self.gpu_s + sum(alive)

    def computed_rows(self) -> float:
        """Rows computed by all replicas, also those that are gone."""
        return sum(own.rows for own in self._born)

    def computed_s(self) -> float:
        """Seconds that all replicas computed, also those that are gone."""
        return sum(own.busy_s for own in self._born)

    def computed_s_by_group(self) -> list[float]:
        """The same, of each group."""
        busy_s = list(self._gone_busy_s)
        for own in self:
            busy_s[own.group] += own.busy_s
        return busy_s
