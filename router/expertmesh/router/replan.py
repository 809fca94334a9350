"""When copies of experts should move, and which: re-weight first, move last. Pure.

Routers solve dispatch anew for every call, which is free. So a window is bad only if the *solved*
dispatch of the present placement stays uneven beyond what chance explains, and moves are proposed
only after several bad windows in a row: few, those that help most for their bytes, and at most so
many bytes at a time. Copies on fewer nodes than wanted are put right first.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from expertmesh.router.balance import balance
from expertmesh.router.moves import Goal, Holdings, Move, Step, best_move
from expertmesh.router.placement import Placement, lower_bound
from expertmesh.router.popularity import Popularity
from expertmesh.runtime.config import Settings


class ReplanLimits(Settings):
    """When to move, and how much."""

    threshold: float = Field(default=1.1, ge=1)
    """Max/mean load of a layer, with dispatch solved anew and less what chance explains, above
    which a window is bad."""
    goal: float = Field(default=1.03, ge=1)
    """Max/mean load at which moving stops."""
    windows: PositiveInt = 3
    """Bad windows in a row before anything moves."""
    half_life_windows: PositiveFloat = 4.0
    """After so many windows a window counts half in the popularity."""
    max_step_bytes: NonNegativeInt = 2**30
    """Weights loaded for one replan at most; one expert at least."""
    min_copies: PositiveInt = 1
    """Copies of every expert, on distinct nodes, if there are as many nodes and room."""

    @model_validator(mode="after")
    def _moves_end_below_where_they_begin(self) -> Self:
        if self.goal > self.threshold:
            raise ValueError(
                f"goal must be at most threshold, {self.threshold:g}: moves would end where they "
                "begin again"
            )
        return self


@dataclass(frozen=True)
class LayerView:
    """How a layer stands."""

    ratio: float
    """Max/mean load with dispatch solved anew."""
    noise: float
    """Part of it that chance may explain."""
    bad_windows: int
    """In a row until now."""
    bound: float
    """No placement of as many copies and no dispatch has a smaller ratio."""


@dataclass(frozen=True)
class Proposal:
    """What a window led to."""

    layers: Mapping[int, LayerView]
    moves: Sequence[Move]
    reason: str
    """Why there are moves, or none."""
    expected: Mapping[int, float]
    """Layer -> max/mean load after the moves, of the layers they touch."""


class Replanner:
    """Decides window by window."""

    def __init__(self, limits: ReplanLimits) -> None:
        self._limits = limits
        self._bad: dict[int, int] = {}
        self._thin = 0

    def decide(
        self, popularity: Popularity, speeds: Sequence[float], holdings: Holdings
    ) -> Proposal:
        """After each window.

        Args:
            speeds: rows that each replica computes in a unit of time, above 0.
            holdings: ready copies only. Every expert has at least one.
        """
        loads = popularity.known()
        views = {
            layer: self._view(layer, popularity, speeds, holdings.placement[layer])
            for layer in loads
        }
        self._thin = self._thin + 1 if any(_thin(holdings, self._limits.min_copies)) else 0
        due = [layer for layer, bad in self._bad.items() if bad >= self._limits.windows]
        is_thin = self._thin >= self._limits.windows
        if not due and not is_thin:
            return Proposal(views, (), self._why_not(views), {})
        moves = self._moves(due, is_thin, loads, speeds, holdings)
        after = holdings.copy()
        for move in moves:
            after.apply(move.steps)
        touched = {move.steps[0].layer for move in moves} & loads.keys()
        expected = {
            layer: balance(loads[layer], speeds, after.placement[layer]).ratio for layer in touched
        }
        self.forget()  # if nothing helped, there is no use in trying again at once
        return Proposal(views, moves, self._why(due, is_thin, moves), expected)

    def _view(
        self, layer: int, popularity: Popularity, speeds: Sequence[float], placement: Placement
    ) -> LayerView:
        own = popularity.layers[layer]
        found = balance(own.rows, speeds, placement)
        bound = lower_bound(own.rows, speeds, sum(map(len, placement)))
        noise = own.noise(len(speeds))
        is_bad = found.ratio - noise > self._limits.threshold
        self._bad[layer] = self._bad.get(layer, 0) + 1 if is_bad else 0
        return LayerView(found.ratio, noise, self._bad[layer], bound / found.mean)

    def forget(self) -> None:
        """Start counting bad windows anew, as for a placement that is another one."""
        self._bad.clear()
        self._thin = 0

    def _moves(
        self,
        due: Sequence[int],
        is_thin: bool,
        loads: Mapping[int, Sequence[float]],
        speeds: Sequence[float],
        holdings: Holdings,
    ) -> list[Move]:
        limits, planned = self._limits, holdings.copy()
        moves: list[Move] = []
        left = limits.max_step_bytes
        if is_thin:
            for move in _repairs(planned, loads, limits.min_copies):
                if moves and move.num_bytes > left:
                    break
                planned.apply(move.steps)
                moves.append(move)
                left -= move.num_bytes
        goals = {
            layer: Goal(
                loads[layer],
                speeds,
                limits.goal * sum(loads[layer]) / sum(speeds),
                limits.min_copies,
            )
            for layer in due
        }
        return moves + improve(planned, goals, left if moves else max(left, 1), bool(moves))

    def _why_not(self, views: Mapping[int, LayerView]) -> str:
        if not views:
            return "no rows yet"
        worst = max(views, key=lambda layer: views[layer].ratio)
        view = views[worst]
        if view.bad_windows:
            of = f"{view.bad_windows} of {self._limits.windows} windows"
            return f"layer {worst} is uneven ({view.ratio:.3f}) for {of}: waiting"
        return f"dispatch balances every layer: at most {view.ratio:.3f}, of layer {worst}"

    def _why(self, due: Sequence[int], is_thin: bool, moves: Sequence[Move]) -> str:
        what = [f"layers {', '.join(map(str, due))} stay uneven with dispatch solved anew"] * bool(
            due
        )
        what += [f"experts have copies on fewer than {self._limits.min_copies} nodes"] * is_thin
        tail = "" if moves else ", but no move within the memory helps"
        return " and ".join(what) + tail


def improve(
    holdings: Holdings, goals: Mapping[int, Goal], max_bytes: float, is_begun: bool = False
) -> list[Move]:
    """Moves until every layer has reached its goal, bytes are used up, or nothing helps.

    Args:
        holdings: changed as the moves will change it.
        is_begun: whether even the first move must be within `max_bytes`.
    """
    moves: list[Move] = []
    found = {layer: best_move(layer, goal, holdings) for layer, goal in goals.items()}
    while able := {layer: move for layer, move in found.items() if move}:
        layer = max(able, key=lambda own: able[own].gain_frac / able[own].num_bytes)
        move = able[layer]
        if move.num_bytes > max_bytes and (moves or is_begun):
            break
        holdings.apply(move.steps)
        moves.append(move)
        max_bytes -= move.num_bytes
        took = {step.replica for step in move.steps}
        for other, own in found.items():  # what relied on the same room
            if own and (other == layer or any(step.replica in took for step in own.steps)):
                found[other] = best_move(other, goals[other], holdings)
    return moves


def _thin(holdings: Holdings, min_copies: int) -> Iterator[tuple[int, int]]:
    """Experts with copies on too few nodes."""
    most = min(min_copies, len(set(holdings.nodes)))
    for layer, placement in holdings.placement.items():
        for expert in range(len(placement)):
            if holdings.num_nodes(layer, expert) < most:
                yield layer, expert


def _repairs(
    holdings: Holdings, loads: Mapping[int, Sequence[float]], min_copies: int
) -> Iterator[Move]:
    """A copy more on another node for each expert that needs one, the most popular first.

    The caller applies each move before it asks for the next one.
    """

    def share(key: tuple[int, int]) -> float:
        own = loads.get(key[0])
        return own[key[1]] / sum(own) if own else 0.0

    for layer, expert in sorted(_thin(holdings, min_copies), key=lambda key: -share(key)):
        while True:
            steps = _copy_elsewhere(holdings, layer, expert, loads, min_copies)
            if steps is None:
                break
            yield Move(steps, 0.0, holdings.expert_bytes[layer])
            if holdings.num_nodes(layer, expert) >= min_copies:
                break


def _copy_elsewhere(
    holdings: Holdings,
    layer: int,
    expert: int,
    loads: Mapping[int, Sequence[float]],
    min_copies: int,
) -> tuple[Step, ...] | None:
    """Where the most is free on a node that has no copy yet."""
    used = {holdings.nodes[own] for own in holdings.placement[layer][expert]}
    own_loads = loads.get(layer) or [0.0] * len(holdings.placement[layer])
    free = holdings.free_bytes
    for target in sorted(range(len(free)), key=lambda own: -free[own]):
        if holdings.nodes[target] not in used:
            for way in holdings.ways_in(layer, target, own_loads, min_copies):
                return (*way, Step("add", layer, expert, target))
    return None
