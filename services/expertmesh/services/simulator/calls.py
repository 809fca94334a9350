"""The engine that leaves nothing out: every layer call, every batch of every replica.

For small meshes and short times, and to see how far `windows.py` is off. Who computes which rows is
the router's own code, batches are taken as the real batcher takes them, and replicas learn what
they cost as real ones do.
"""

import math
from collections.abc import Callable

import numpy as np

from expertmesh.services.simulator.clock import Clock
from expertmesh.services.simulator.fleet import Phase, VirtualReplica
from expertmesh.services.simulator.gateway import Gateway, Request
from expertmesh.services.simulator.outcome import Outcome, Series
from expertmesh.services.simulator.scaler import Scaler
from expertmesh.services.simulator.station import Station
from expertmesh.services.simulator.world import World, first_replicas

_LOOKS = 1000
"""Moments of the series."""


def run_calls(world: World, progress: Callable[[float], None] = lambda frac: None) -> Outcome:
    """Simulate.

    Args:
        progress: told from time to time which part is done, 0 to 1.
    """
    return _Calls(world).run(progress)


class _Calls:
    def __init__(self, world: World) -> None:
        self._world = world
        self._fleet = fleet = world.fleet
        self._clock = Clock()
        self._stations: dict[str, Station] = {}
        self._scaler = Scaler(world.scenario.scaling, fleet, self._queued_rows)
        self._series = Series()
        count = len(world.arrivals)
        self._first_s, self._last_s = np.full(count, np.inf), np.full(count, np.inf)
        self._next = self._open = 0
        fleet.on_change = self._on_change
        for group, number in enumerate(first_replicas(world.scenario)):
            for _ in range(number):
                fleet.add(group, 0.0, at_once=True)
        self._is_open_loop = not world.scenario.mesh.gateways
        routers = [] if self._is_open_loop else world.routers
        self._gateways = [self._gateway(number) for number in range(len(routers))]
        self._ended_tokens = self._ended_calls = 0

    def _gateway(self, number: int) -> Gateway:
        router = self._world.routers[number]
        return Gateway(
            self._world, router, self._stations, self._clock, self._on_token, self._on_failed
        )

    def _on_change(self, replica: VirtualReplica) -> None:
        if replica.name not in self._stations:
            rows, weight = self._world.scenario.mesh.max_batch_rows, self._world.layer_weight
            self._stations[replica.name] = Station(
                replica, rows, weight, self._clock, lambda group: self._fleet.meters[group]
            )
        if replica.is_lost:
            self._stations[replica.name].die()
        for router in self._world.routers:
            router.hear(replica, self._clock.now_s, self._stations[replica.name].load())

    # -- the clock -------------------------------------------------------------------------------

    def run(self, progress: Callable[[float], None]) -> Outcome:
        """See `run_calls`."""
        length_s = self._world.arrivals.duration_s
        look_s, looks = (length_s or 1.0) / _LOOKS, 0
        while self._open or self._next < len(self._first_s) or self._clock.now_s < length_s:
            arrival_s = self._arrival_s()
            others_s = min(self._world.next_s, self._scaler.next_s, looks * look_s)
            due_s = min(arrival_s, others_s, self._clock.next_s)
            if due_s == self._clock.next_s and due_s < min(arrival_s, others_s):
                self._clock.step()
                continue
            self._clock.now_s = due_s
            if due_s == arrival_s:
                self._arrive()
                continue
            self._world.advance(due_s)
            if due_s >= self._scaler.next_s:
                self._scaler.look(due_s)
            if due_s >= looks * look_s:
                looks += 1
                self._look()
                progress(min(1.0, due_s / length_s) if length_s else 1.0)
        return self._outcome()

    def _arrival_s(self) -> float:
        done = self._next == len(self._first_s)
        return math.inf if done else float(self._world.arrivals.times_s[self._next])

    def _arrive(self) -> None:
        arrivals, number = self._world.arrivals, self._next
        self._next += 1
        self._open += 1
        prompt, answer = int(arrivals.context[number]), int(arrivals.generated[number])
        if self._is_open_loop:
            gateway = self._gateway(0)
            self._gateways.append(gateway)
        else:
            gateway = min(self._gateways, key=lambda own: own.load)
        gateway.come(Request(number, prompt, answer))

    def _on_token(self, request: Request) -> None:
        now_s = self._clock.now_s
        if math.isinf(self._first_s[request.number]):
            self._first_s[request.number] = now_s
        if not request.answer_left:
            self._last_s[request.number] = now_s
            self._open -= 1

    def _on_failed(self, request: Request) -> None:
        self._open -= 1

    # -- what is seen ----------------------------------------------------------------------------

    def _queued_rows(self, group: int) -> float:
        here = (self._stations[own.name] for own in self._fleet.ready(group))
        return sum(station.queued_rows for station in here)

    def _look(self) -> None:
        self._forget_the_done()
        waiting = sum(gateway.waiting_tokens for gateway in self._gateways)
        self._series.look(self._clock.now_s, self._fleet, waiting, self._tokens())

    def _forget_the_done(self) -> None:
        """Gateways of single requests that are through."""
        if self._is_open_loop:
            through = [own for own in self._gateways if not own.load]
            self._ended_tokens += sum(own.tokens for own in through)
            self._ended_calls += sum(own.calls for own in through)
            self._gateways = [own for own in self._gateways if own.load]

    def _tokens(self) -> int:
        return self._ended_tokens + sum(gateway.tokens for gateway in self._gateways)

    def _outcome(self) -> Outcome:
        arrivals, fleet = self._world.arrivals, self._fleet
        calls = self._ended_calls + sum(gateway.calls for gateway in self._gateways)
        return Outcome(
            arrivals=arrivals,
            ttft_s=self._first_s - arrivals.times_s,
            latency_s=self._last_s - arrivals.times_s,
            series=self._series,
            gpu_s=fleet.gpu_seconds(self._clock.now_s),
            end_s=self._clock.now_s,
            tokens=self._tokens(),
            rows=fleet.computed_rows(),
            planned_calls=calls,
            imbalance=self._imbalance(),
            changes=self._scaler.changes,
            lost=fleet.lost,
        )

    def _imbalance(self) -> float:
        busy = [own.busy_s for own in self._fleet if own.phase is Phase.READY]
        return max(busy) * len(busy) / sum(busy) if sum(busy) else 1.0
