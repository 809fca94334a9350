"""A virtual replica's queue: rows of one layer, across callers, one batch, as the real batcher."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from expertmesh.experts.load_stats import LoadStats
from expertmesh.services.simulator.clock import Clock
from expertmesh.services.simulator.fleet import GroupMeter, VirtualReplica
from expertmesh.v1 import control_pb2


@dataclass(eq=False, slots=True)
class Shipment:
    """Rows of one call that are at one replica."""

    layer: int
    rows: Mapping[int, int]
    """Of each expert."""
    settle: Callable[["Shipment", "Station", bool], None]
    """Told when it is answered (True) or lost (False)."""
    num_rows: int
    arrived_s: float = 0.0


@dataclass(eq=False)
class Station:
    """The queue of a replica.

    Args:
        weight: layers that each simulated one stands for: everything takes so many times as long.
    """

    replica: VirtualReplica
    max_batch_rows: int
    weight: float
    clock: Clock
    meter: Callable[[int], GroupMeter]
    """The meter of a group now."""
    stats: LoadStats = field(default_factory=LoadStats)

    def __post_init__(self) -> None:
        self._queue: deque[Shipment] = deque()
        self._batch: list[Shipment] = []
        self._is_dead = False

    def arrive(self, shipment: Shipment) -> None:
        """Rows come in."""
        if self._is_dead:
            shipment.settle(shipment, self, False)
            return
        shipment.arrived_s = self.clock.now_s
        self.stats.queued_rows += shipment.num_rows
        self._queue.append(shipment)
        if not self._batch:
            self._start()

    def _start(self) -> None:
        self._batch = self._take()
        rows = sum(shipment.num_rows for shipment in self._batch)
        experts = len({expert for shipment in self._batch for expert in shipment.rows})
        start_s = max(self.clock.now_s, self.replica.paused_until_s)
        took_s = self.replica.batch_s(experts, rows) * self.weight
        self.clock.at(start_s + took_s, lambda: self._end(start_s, took_s, experts, rows))

    def _take(self) -> list[Shipment]:
        """The oldest shipment and later ones of its layer, while they fit a batch."""
        batch: list[Shipment] = []
        rest: deque[Shipment] = deque()
        rows = 0
        for own in self._queue:
            fits = rows + own.num_rows <= self.max_batch_rows
            if not batch or (own.layer == batch[0].layer and fits):
                batch.append(own)
                rows += own.num_rows
            else:
                rest.append(own)
        self._queue = rest
        return batch

    def _end(self, start_s: float, took_s: float, experts: int, rows: int) -> None:
        if self._is_dead:
            return
        batch, self._batch = self._batch, []
        self.replica.rows += rows * self.weight
        self.replica.busy_s += took_s
        self.stats.queued_rows -= rows
        self.stats.observe(rows, start_s - batch[0].arrived_s, took_s)
        self.stats.fit.observe(experts, rows, took_s * 1e6)
        self._measure(batch, rows, start_s, took_s)
        if self._queue:
            self._start()
        for shipment in batch:
            shipment.settle(shipment, self, True)

    def _measure(self, batch: list[Shipment], rows: int, start_s: float, took_s: float) -> None:
        meter = self.meter(self.replica.group)
        meter.busy_s += took_s
        meter.done_rows += rows * self.weight
        meter.started_rows += rows
        meter.waited_row_s += sum(own.num_rows * (start_s - own.arrived_s) for own in batch)

    @property
    def queued_rows(self) -> float:
        """Rows that are here, those of layers that are not simulated counted in."""
        return self.stats.queued_rows * self.weight

    def die(self) -> None:
        """All that is here is lost."""
        self._is_dead = True
        lost = [*self._batch, *self._queue]
        self._batch, self._queue = [], deque()
        for shipment in lost:
            shipment.settle(shipment, self, False)

    def load(self) -> control_pb2.ReplicaLoad:
        """What its answers say of it."""
        stats, cost = self.stats, self.stats.fit.cost
        return control_pb2.ReplicaLoad(
            queued_rows=stats.queued_rows,
            row_time_us=stats.row_time_us,
            queue_time_us=stats.queue_time_us,
            done_rows=stats.done_rows,
            batch_time_us=cost.batch_us,
            expert_time_us=cost.expert_us,
            row_cost_us=cost.row_us,
        )
