"""Is a cost linear, or better, beyond a fixed cost? Two questions that fail in different places."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

_FEWEST_POINTS = 3


@dataclass(frozen=True)
class Line:
    """cost = fixed + slope * x."""

    fixed: float
    slope: float

    def at(self, x: float) -> float:
        """The cost the line foretells."""
        return self.fixed + self.slope * x


@dataclass(frozen=True)
class Worst:
    """The greatest of some ratios, and the x it was found at."""

    ratio: float
    x: float


def weigh(terms: Sequence[Sequence[float]], costs: Sequence[float]) -> list[float]:
    """What one of each term costs. One row of `terms` for each cost.

    Least squares of the relative errors, so that a small cost counts as much as a large one.
    """
    known = np.asarray(costs, dtype=float)
    rows = np.asarray(terms, dtype=float) / known[:, None]
    return [float(weight) for weight in np.linalg.lstsq(rows, np.ones(len(known)), rcond=None)[0]]


def fit(xs: Sequence[float], costs: Sequence[float]) -> Line:
    """The line of least relative errors among those that neither start below zero nor fall."""
    if len(xs) > 1:
        fixed, slope = weigh([(1, x) for x in xs], costs)
        if slope >= 0:
            return Line(fixed, slope) if fixed >= 0 else Line(0, _only([(x,) for x in xs], costs))
    return Line(_only([(1,) for _ in xs], costs), 0)


def _only(terms: Sequence[Sequence[float]], costs: Sequence[float]) -> float:
    [weight] = weigh(terms, costs)
    return weight


@dataclass(frozen=True)
class Growth:
    """How a cost grows with x, which ascends.

    Points before the cheapest are left out: there the cost falls, because a second core takes over
    work, and no line that may be extended falls.
    """

    xs: Sequence[float]
    costs: Sequence[float]

    @property
    def first(self) -> int:
        """The cheapest point."""
        return min(range(len(self.costs)), key=lambda number: self.costs[number])

    @property
    def fitted(self) -> range:
        """The points of the line: the first half from the cheapest on, never the last of all."""
        half = max(_FEWEST_POINTS, (len(self.costs) - self.first) // 2)
        return range(self.first, max(self.first + 1, min(self.first + half, len(self.costs) - 1)))

    @property
    def line(self) -> Line:
        """Through the fitted points."""
        return fit([self.xs[n] for n in self.fitted], [self.costs[n] for n in self.fitted])

    @property
    def over_line(self) -> Worst:
        """The later points over what the line foretells: above 1 the cost bends up after them.

        Sees a slow start of something that grows faster than x. Blind when the first units are
        dearer than later ones, because then the line is too steep: see `under_chord`.
        """
        later = range(self.fitted.stop, len(self.xs)) or self.fitted
        ratios = [Worst(self.costs[n] / self.line.at(self.xs[n]), self.xs[n]) for n in later]
        return max(ratios, key=lambda worst: worst.ratio)

    @property
    def under_chord(self) -> Worst:
        """A straight line between two points over the cost between them: above 1 it bends up there.

        (0, 0) counts as a point, as a fixed cost is never negative: so the last cost per unit over
        that of any other point is among the ratios. Nothing is extended, so noise stays as it is.
        Blind to a bend that is small beside the fixed cost: see `over_line`.
        """
        points = [(0.0, 0.0), *list(zip(self.xs, self.costs, strict=True))[self.first :]]
        ratios = [Worst(1.0, self.xs[-1])]
        for (x0, cost0), (x1, cost1), (x2, cost2) in combinations(points, 3):
            chord = cost0 + (cost2 - cost0) * (x1 - x0) / (x2 - x0)
            ratios.append(Worst(chord / cost1, x1))
        return max(ratios, key=lambda worst: worst.ratio)
