"""Is a cost linear? A fixed cost plus a slope, fitted to the lower half of an axis."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Line:
    """cost = fixed + slope * x."""

    fixed: float
    slope: float

    def at(self, x: float) -> float:
        """The cost the line foretells."""
        return self.fixed + self.slope * x


def fit(xs: Sequence[float], costs: Sequence[float]) -> Line:
    """Least squares of the relative errors, so that a small cost counts as much as a large one."""
    known = np.asarray(costs, dtype=float)
    terms = np.column_stack([np.ones(len(known)), np.asarray(xs, dtype=float)])
    fixed, slope = np.linalg.lstsq(terms / known[:, None], np.ones(len(known)), rcond=None)[0]
    return Line(float(fixed), float(slope))


def over_foretold(xs: Sequence[float], costs: Sequence[float]) -> float:
    """The cost at the largest x over what the lower half of the points foretells for it.

    Below 1 the cost bends down (later units are cheaper), above 1 it bends up.
    """
    half = (len(xs) + 1) // 2
    return costs[-1] / fit(xs[:half], costs[:half]).at(xs[-1])
