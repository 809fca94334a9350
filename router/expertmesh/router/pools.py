"""What replicas cost a call and how rows are poured into them. Pure; times in microseconds."""

from collections.abc import Sequence
from typing import NamedTuple

_BLUR = 0.1


class Costs(NamedTuple):
    """What a replica takes for rows of a call."""

    batch_us: float = 0.0
    """For any."""
    expert_us: float = 0.0
    """For each expert."""
    row_us: float = 1.0
    """For each row; above 0."""
    load_us: float = 0.0
    """For each expert whose weights are not on its device."""


class Standing(NamedTuple):
    """A replica as a call finds it."""

    costs: Costs
    ready_us: float = 0.0
    """Until it could answer: what it has to do already, and the way there and back."""
    resident: frozenset[int] | None = None
    """Experts of the call's layer on its device; None: all it holds."""
    is_fresh: bool = True
    """Whether that is news. Who follows old news goes where all others go."""
    may_split: bool = True
    """Whether it may get some of an expert's rows while another replica gets the others."""


def row_us(expert: int, standing: Standing) -> float:
    """Until a replica could answer one row for an expert."""
    costs = standing.costs
    needed_us = standing.ready_us + costs.batch_us + costs.expert_us + costs.row_us
    is_cold = standing.resident is not None and expert not in standing.resident
    return needed_us + costs.load_us if is_cold else needed_us


class Pool:
    """A replica that rows are poured into."""

    __slots__ = (
        "expert_us", "first_us", "is_fresh", "level_us", "load_us", "may_split", "name", "resident",
        "row_us", "rows", "tie",
    )  # fmt: skip

    def __init__(self, name: str, standing: Standing, tie: float) -> None:
        costs, ready_us, self.resident, self.is_fresh, self.may_split = standing
        batch_us, self.expert_us, self.row_us, self.load_us = costs
        self.name = name
        self.tie = tie
        """From 0 to 1, drawn anew for each call: otherwise every router would take the same one of
        equals, and nobody would ever learn that the other one has become faster."""
        self.first_us = (ready_us + batch_us) * (1 + _BLUR * tie)
        self.level_us = 0.0
        self.rows: dict[int, int] = {}
        """Of each expert."""

    def start_us(self, expert: int, message_us: float) -> float:
        """Its level once it is asked for the expert, before the first row."""
        start_us = self.level_us + self.expert_us
        if not self.rows:
            start_us += self.first_us + message_us
        if self.resident is not None and expert not in self.resident:
            start_us += self.load_us
        return start_us

    def take(self, expert: int, rows: int, start_us: float) -> None:
        """Add rows of an expert it has none of."""
        self.level_us = start_us + rows * self.row_us
        self.rows[expert] = rows

    def give_back(self, expert: int) -> None:
        """Remove the rows of an expert, if it has any."""
        rows = self.rows.pop(expert, 0)
        if not self.rows:
            self.level_us = 0.0
        elif rows:
            self.level_us -= self.expert_us + rows * self.row_us
            if self.resident is not None and expert not in self.resident:
                self.level_us -= self.load_us


Start = tuple[float, float, Pool]
"""Its level before the first row of an expert, its tie breaker, and itself."""


def by_start(start: Start) -> tuple[float, float]:
    return start[:2]


def water_level(starts: Sequence[Start], count: int) -> tuple[float, Sequence[Start]]:
    """The lowest common level at which some of the replicas hold all rows, and which those are.

    Args:
        starts: levels before the first row, ascending.
    """
    level_us = inverse = weighted = 0.0
    for number, (start_us, _, pool) in enumerate(starts):
        if number and level_us <= start_us:
            return level_us, starts[:number]
        rate = 1 / pool.row_us
        inverse, weighted = inverse + rate, weighted + start_us * rate
        level_us = (count + weighted) / inverse
    return level_us, starts


def whole_rows(
    starts: Sequence[Start], level_us: float, count: int
) -> list[tuple[Pool, int, float]]:
    """(replica, rows, start) of those that get rows: the level's rows, by largest remainder."""
    shares = [(level_us - start_us) / p.row_us for start_us, _, p in starts]
    rows = [int(share) for share in shares]
    by_remainder = sorted(range(len(rows)), key=lambda own: rows[own] - shares[own])
    for own in by_remainder[: count - sum(rows)]:
        rows[own] += 1
    return [(p, n, start_us) for (start_us, _, p), n in zip(starts, rows, strict=True) if n]
