"""How busy a replica is and has been, and what it expects work to take. Pure.

For its heartbeat and answers, its admission, and the rule of scaling.
"""

from dataclasses import dataclass, field

from expertmesh.experts.cost_fit import CostFit

_EWMA_WEIGHT = 0.1
_MOST_SURPRISE = 8.0
_FULL_WEIGHT_S = 0.001
"""Shorter batches say more about the time between them."""
_MOST_DRIFT = 1000.0
OVERDUE_S, OVERDUE_TIMES = 5.0, 4.0
"""A batch that takes so much more, and so many times, what it should take is stuck."""


@dataclass
class LoadStats:
    """Kept by the batcher. Totals are since the start of the replica."""

    queued_rows: int = 0
    """Admitted and not yet answered."""
    queued_bytes: int = 0
    arrived_rows: int = 0
    """Admitted in total."""
    done_rows: int = 0
    """Computed in total."""
    busy_s: float = 0.0
    """Time spent computing them, of batches that are over."""
    waited_row_s: float = 0.0
    """Time they had waited for it, summed over rows."""
    row_time_us: float = 0.0
    queue_time_us: float = 0.0
    fit: CostFit = field(default_factory=CostFit)
    drift: float = 1.0
    """Real over fitted time of the last batches: the fit sees compute only, and learns late that a
    device has become another. A geometric mean: one batch during which the process did not run is
    forgotten as fast as it came."""
    _since_s: float | None = None
    """When the batch that is being computed began."""
    _due_s: float = 0.0
    """What it should take."""

    def observe(
        self, num_rows: int, queue_s: float, compute_s: float, waited_row_s: float = 0.0
    ) -> None:
        """Account one computed batch.

        Args:
            queue_s: of its oldest row.
            waited_row_s: of all its rows together.
        """
        weight = _EWMA_WEIGHT if self.done_rows else 1.0
        self.row_time_us += weight * (compute_s * 1e6 / num_rows - self.row_time_us)
        self.queue_time_us += weight * (queue_s * 1e6 - self.queue_time_us)
        self.done_rows += num_rows
        self.busy_s += compute_s
        self.waited_row_s += waited_row_s
        self._since_s = None

    # -- the batch of this moment ----------------------------------------------------------------

    def begin(self, now_s: float, num_rows: int) -> None:
        """A batch is being computed from now on, until it is observed or has ended."""
        self._since_s, self._due_s = now_s, num_rows * self.row_time_us / 1e6

    def end(self) -> None:
        """It has failed, or is not to be counted."""
        self._since_s = None

    def is_on_time(self, now_s: float) -> bool:
        """Whether a batch is being computed that may well take as long as it has taken."""
        if self._since_s is None:
            return False
        return now_s - self._since_s < OVERDUE_S + OVERDUE_TIMES * self._due_s

    def busy_until(self, now_s: float) -> float:
        """Time spent computing, with what the batch of this moment has taken so far."""
        return self.busy_s + (now_s - self._since_s if self._since_s is not None else 0.0)

    # -- what work takes -------------------------------------------------------------------------

    def expected_s(self, batches: float, experts: float, rows: float) -> float:
        """How long so much work takes, everything included; 0 while nothing is known."""
        return self.fitted_s(batches, experts, rows) * self.drift

    def fitted_s(self, batches: float, experts: float, rows: float) -> float:
        """How long computing it should take."""
        cost = self.fit.cost
        fitted_us = batches * cost.batch_us + experts * cost.expert_us + rows * cost.row_us
        return fitted_us * 1e-6

    def observe_wall(self, fitted_s: float, took_s: float) -> None:
        """How long a batch of a busy replica kept it, with all that is done between batches.

        Args:
            fitted_s: what was expected, without `drift`.
        """
        if fitted_s <= 0 or took_s <= 0:
            return
        surprise = min(max(took_s / fitted_s / self.drift, 1 / _MOST_SURPRISE), _MOST_SURPRISE)
        weight = _EWMA_WEIGHT * min(1.0, fitted_s / _FULL_WEIGHT_S)
        self.drift = min(max(self.drift * surprise**weight, 1 / _MOST_DRIFT), _MOST_DRIFT)
