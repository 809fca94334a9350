"""What a batch costs on this replica, learned from the batches it has computed. Pure.

time = batch + expert * (experts in the batch) + row * (rows), all in microseconds, by least squares
of the relative error, so that short batches count as much as long ones; none of the three can be
negative (Lawson and Hanson, "Solving Least Squares Problems", 1974, by trying every set of them).
Older batches count less and less: a device that slows down is soon known as a slow one.
"""

from itertools import combinations
from typing import NamedTuple

_FORGET = 0.99
_FIRST_BATCHES = 8
"""After each of them the costs are fitted anew, later after every _REFIT_BATCHES."""
_REFIT_BATCHES = 64
_RIDGE = 1e-6
"""Of the diagonal: batches of one size alone leave three unknowns in one equation."""
_SETS = [own for size in (3, 2, 1) for own in combinations(range(3), size)]

Vector = list[float]


class BatchCost(NamedTuple):
    """Expected time of a batch, in microseconds; all 0 when no batch was seen."""

    batch_us: float = 0.0
    expert_us: float = 0.0
    row_us: float = 0.0


class CostFit:
    """Learns from `observe`; `cost` is what it knows."""

    def __init__(self) -> None:
        self.cost = BatchCost()
        self._count = 0
        self._unseen: list[tuple[int, int, float]] = []
        """Batches since the last fit: they are folded in when the costs are fitted, in one go, as
        between other work each of them takes several times as long."""
        self._squares = [[0.0] * 3 for _ in range(3)]
        self._sums = [0.0] * 3

    def observe(self, num_experts: int, num_rows: int, compute_us: float) -> None:
        """Account one batch.

        Args:
            num_experts: different experts in it.
            num_rows: rows in it.
            compute_us: what it took.
        """
        if compute_us <= 0:  # a clock that stands still says nothing
            return
        self._unseen.append((num_experts, num_rows, compute_us))
        self._count += 1
        if self._count <= _FIRST_BATCHES or self._count % _REFIT_BATCHES == 0:
            for batch in self._unseen:
                self._fold_in(*batch)
            self._unseen.clear()
            self.cost = BatchCost(*_non_negative(self._squares, self._sums))

    def _fold_in(self, num_experts: int, num_rows: int, compute_us: float) -> None:
        features = (1 / compute_us, num_experts / compute_us, num_rows / compute_us)
        for i, left in enumerate(features):
            self._sums[i] = _FORGET * self._sums[i] + left
            for j, right in enumerate(features):
                self._squares[i][j] = _FORGET * self._squares[i][j] + left * right


def _non_negative(squares: list[Vector], sums: Vector) -> Vector:
    """The x >= 0 with the least x.squares.x - 2 sums.x."""
    best, least = [0.0] * 3, 0.0
    for own in _SETS:
        found = _solved(
            [[squares[i][j] * (1 + _RIDGE * (i == j)) for j in own] for i in own],
            [sums[i] for i in own],
        )
        error = -sum(sums[i] * value for i, value in zip(own, found, strict=True))
        if min(found) >= 0 and error < least:
            best, least = [0.0] * 3, error
            for i, value in zip(own, found, strict=True):
                best[i] = value
    return best


def _solved(matrix: list[Vector], right: Vector) -> Vector:
    """Gauss's elimination; the matrix is positive definite, so no pivot is 0."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i, pivot in enumerate(rows):
        for other in rows[i + 1 :]:
            factor = other[i] / pivot[i]
            for j in range(i, len(pivot)):
                other[j] -= factor * pivot[j]
    found = [0.0] * len(rows)
    for i in reversed(range(len(rows))):
        known = sum(rows[i][j] * found[j] for j in range(i + 1, len(rows)))
        found[i] = (rows[i][-1] - known) / rows[i][i]
    return found
