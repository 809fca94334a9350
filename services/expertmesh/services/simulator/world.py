"""Everything a simulation is made of, built and checked before it runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np

from expertmesh.router.placement import plan_placement
from expertmesh.services.simulator.arrivals import Arrivals, read_trace, repeated
from expertmesh.services.simulator.costs import replica_costs
from expertmesh.services.simulator.fleet import Fleet, VirtualReplica
from expertmesh.services.simulator.popularity import Popularity, make_popularity
from expertmesh.services.simulator.routing import VirtualRouter
from expertmesh.services.simulator.scenario import Fault, Scenario


@dataclass
class World:
    """A mesh and what will happen to it."""

    scenario: Scenario
    arrivals: Arrivals
    popularity: Popularity
    fleet: Fleet
    routers: list[VirtualRouter]
    """One for each gateway."""
    layers: list[int]
    """Layers that are simulated."""
    experts: list[list[int]]
    """Of each group."""
    faults: list["Change"]
    """Ascending in time."""
    draws: np.random.Generator
    paused: list[VirtualReplica] = field(default_factory=list)
    """Replicas that have been paused at some time."""

    @property
    def layer_weight(self) -> float:
        """Layers of the model that each simulated one stands for."""
        return self.scenario.model.layers / len(self.layers)

    @property
    def next_s(self) -> float:
        """When `advance` has something to do next; infinite if nothing is to come."""
        return min(self.fleet.next_s, self.faults[0].at_s if self.faults else math.inf)

    def advance(self, now_s: float) -> None:
        """Replicas get ready and leave, faults begin and end."""
        while self.faults and self.faults[0].at_s <= now_s:
            self.paused += self.faults.pop(0).apply(self.fleet, now_s)
        self.fleet.advance(now_s)

    def rows(self, layer: int, num_tokens: int, now_s: float) -> dict[int, int]:
        """Rows of each expert that gets some, for a call of so many tokens."""
        shares_LE = self.popularity.shares_LE(self.popularity.phase(now_s))
        num_rows = num_tokens * self.scenario.model.top_k
        counts = self.draws.multinomial(num_rows, shares_LE[layer])
        return {int(expert): int(counts[expert]) for expert in np.flatnonzero(counts)}


@dataclass
class Change:
    """A fault that begins or ends."""

    at_s: float
    fault: Fault
    random: Random
    hit: list[VirtualReplica]
    """The replicas it befell."""
    ends: bool = False

    def apply(self, fleet: Fleet, now_s: float) -> list[VirtualReplica]:
        """Do it. Returns the replicas that it pauses."""
        fault = self.fault
        if self.ends:
            for replica in self.hit:
                replica.slow_factor = 1.0
                fleet.on_change(replica)
            return []
        groups = range(fleet.num_groups) if fault.group is None else (fault.group,)
        able = [replica for group in groups for replica in fleet.ready(group)]
        self.hit += self.random.sample(able, min(fault.replicas, len(able)))
        for replica in self.hit:
            if fault.kind == "kill":
                fleet.kill(replica, now_s)
            elif fault.kind == "slow":
                replica.slow_factor = fault.factor
                fleet.on_change(replica)
            else:
                replica.paused_until_s = now_s + fault.for_s
        return self.hit if fault.kind == "pause" else []


def build_world(scenario: Scenario, folder: Path) -> World:
    """Read, check and build everything.

    Args:
        folder: from which relative files count.

    Raises:
        InvalidInput: bad rows of the trace, or counts of another model.
        ConfigError: an unknown GPU.
    """
    model, mesh = scenario.model, scenario.mesh
    costs = replica_costs(mesh, model)
    trace = read_trace(folder / scenario.trace.file)
    draws = np.random.default_rng(scenario.seed)
    asked = scenario.trace
    arrivals = repeated(
        trace, asked.rate, asked.spread_s, asked.duration_s, asked.daily_swing, draws
    )
    popularity = make_popularity(scenario.popularity, model, arrivals.duration_s, draws, folder)
    experts = _planned(popularity, mesh.groups, mesh.spare_slots)
    largest = max(len(own) for own in experts)
    load_s = model.layers * largest * model.expert_bytes / scenario.start.load_bytes_per_s
    fleet = Fleet(mesh.groups, costs, scenario.start, load_s, Random(scenario.seed))
    layers = _spread(model.layers, min(scenario.sampling.layers, model.layers))
    num_routers = max(1, mesh.gateways) if scenario.sampling.engine == "calls" else 1
    routers = [
        VirtualRouter(experts, layers, mesh.costs.transport_us, Random(scenario.seed + own))
        for own in range(num_routers)
    ]
    changes = _changes(scenario)
    return World(scenario, arrivals, popularity, fleet, routers, layers, experts, changes, draws)


def _planned(popularity: Popularity, groups: int, spare: int) -> list[list[int]]:
    """The experts of each group, placed for the popularity at the beginning."""
    loads = popularity.shares_LE(0).mean(0)
    num_slots = len(loads) + spare
    slots = [num_slots * (own + 1) // groups - num_slots * own // groups for own in range(groups)]
    placement = plan_placement(loads.tolist(), [1.0] * groups, slots)
    return [
        [expert for expert, holders in enumerate(placement) if own in holders]
        for own in range(groups)
    ]


def _spread(num_layers: int, count: int) -> list[int]:
    return [num_layers * own // count for own in range(count)]


def _changes(scenario: Scenario) -> list[Change]:
    changes: list[Change] = []
    for number, fault in enumerate(scenario.faults):
        hit: list[VirtualReplica] = []
        random = Random(scenario.seed * 1000 + number)
        changes.append(Change(fault.at_s, fault, random, hit))
        if fault.kind == "slow":
            changes.append(Change(fault.at_s + fault.for_s, fault, random, hit, ends=True))
    return sorted(changes, key=lambda own: own.at_s)


def first_replicas(scenario: Scenario) -> Sequence[int]:
    """Replicas of each group at the beginning."""
    given = scenario.scaling.replicas
    return given * scenario.mesh.groups if len(given) == 1 else given
