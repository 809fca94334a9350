"""What replicas said in a window, as the planner wants it. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expertmesh.router.moves import Holdings, Step
from expertmesh.v1 import control_pb2, placement_pb2

_ALIKE = 1.5
"""Replicas that take at most so many times as long as the median, or as short, count as equally
fast: fitted costs are not that precise."""
_REFERENCE = (4, 64)
"""Experts and rows of the batch by whose time replicas are compared."""

Rows = dict[tuple[str, int, int, int], int]
"""(replica, incarnation, layer, expert) -> rows computed since the replica started"""


@dataclass(frozen=True)
class Seen:
    """A replica that takes work, by its heartbeat and by its own account."""

    state: control_pb2.ReplicaState
    survey: placement_pb2.SurveyResponse


@dataclass(frozen=True)
class World:
    """The mesh as the planner wants it. Replicas are numbered by `names`."""

    names: Sequence[str]
    holdings: Holdings
    speeds: Sequence[float]
    missing: Sequence[tuple[int, int]]
    """(layer, expert) that no replica holds."""


def num_experts(seen: Sequence[Seen]) -> dict[int, int]:
    """Experts of each MoE layer of the model."""
    return {own.layer: own.num_experts for one in seen for own in one.survey.layers}


def world_of(seen: Sequence[Seen], times: Sequence[float]) -> World:
    """Who holds what, where there is room, and how fast each is.

    Args:
        times: of each replica for the same work, in any unit; 0 if it is not known.
    """
    counts = num_experts(seen)
    placement: dict[int, list[list[int]]] = {
        layer: [[] for _ in range(count)] for layer, count in sorted(counts.items())
    }
    pinned = set()
    for place, one in enumerate(seen):
        for own in one.survey.layers:
            for expert in own.experts:
                placement[own.layer][expert].append(place)
                if expert not in own.guests:
                    pinned.add((own.layer, expert, place))
    holdings = Holdings(
        placement,
        [one.survey.free_guest_bytes for one in seen],
        {own.layer: own.expert_bytes for one in seen for own in one.survey.layers},
        [one.state.host for one in seen],
        frozenset(pinned),
    )
    missing = [
        (layer, expert)
        for layer, found in placement.items()
        for expert, holders in enumerate(found)
        if not holders
    ]
    return World([one.state.replica for one in seen], holdings, speeds_of(times), missing)


def batch_time_us(load: control_pb2.ReplicaLoad) -> float:
    """What a replica says that the reference batch takes it; 0 if it has not computed any yet."""
    num_experts, num_rows = _REFERENCE
    return load.batch_time_us + num_experts * load.expert_time_us + num_rows * load.row_cost_us


def speeds_of(times: Sequence[float]) -> list[float]:
    """Work per time of each replica; those about as fast as the median are equal to it."""
    known = [time for time in times if time > 0]
    median = statistics.median(known) if known else 1.0
    return [
        1 / (median if not time or 1 / _ALIKE <= time / median <= _ALIKE else time)
        for time in times
    ]


def rows_so_far(seen: Sequence[Seen]) -> Rows:
    """What each replica has computed in its life."""
    return {
        (one.state.replica, one.survey.incarnation, own.layer, expert): rows
        for one in seen
        for own in one.survey.layers
        for expert, rows in zip(own.experts, own.rows, strict=True)
    }


def window_rows(before: Rows, now: Rows, counts: Mapping[int, int]) -> dict[int, list[float]]:
    """Layer -> rows of each expert between two surveys."""
    found = {layer: [0.0] * count for layer, count in counts.items()}
    for key, rows in now.items():
        # a count that has shrunk began anew: the expert was given up and taken on again
        began = before.get(key, 0)
        found[key[2]][key[3]] += rows - began if rows >= began else rows
    return found


def step_to_proto(step: Step, names: Sequence[str]) -> placement_pb2.PlacementStep:
    """For the record."""
    return placement_pb2.PlacementStep(
        add=step.kind == "add",
        layer=step.layer,
        expert=step.expert,
        replica=names[step.replica],
    )
