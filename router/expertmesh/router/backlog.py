"""What this router's callers have at each replica, and whether a call could still make it there.

Pure. Times in seconds, costs in microseconds.
"""

from collections.abc import Callable, Sequence

from expertmesh.router.plan import Shipment
from expertmesh.router.snapshot import Life, Replica
from expertmesh.runtime.errors import CannotMakeIt
from expertmesh.runtime.origin import Origin

_MARGIN = 1.4
"""Larger than replicas': who is refused here has cost nobody anything, while of a call that one of
its replicas refuses the others have computed their part."""


class Backlog:
    """Rows that are under way at replicas, by whose they are."""

    def __init__(self) -> None:
        self._rows: dict[Life, dict[Origin, int]] = {}

    def add(self, life: Life, origin: Origin, num_rows: int) -> None:
        """Rows have been sent."""
        rows = self._rows.setdefault(life, {})
        rows[origin] = rows.get(origin, 0) + num_rows

    def remove(self, life: Life, origin: Origin, num_rows: int) -> None:
        """They are answered, or nobody waits for them any more."""
        rows = self._rows[life]
        rows[origin] -= num_rows
        if not rows[origin]:
            del rows[origin]
            if not rows:
                del self._rows[life]

    def rows_before(self, life: Life, origin: Origin, num_rows: int) -> int:
        """Rows that the replica computes before those the origin would add now, as far as this
        router knows: its shares are those of `runtime.fair_queue`."""
        rows = self._rows.get(life)
        if not rows:
            return 0
        found = rows.get(origin, 0)
        until = found + num_rows
        for other, count in rows.items():
            if other.priority < origin.priority:
                found += count
            elif other.priority == origin.priority and other != origin:
                found += min(count, until)
        return found

    def _others_before(self, replica: Replica, origin: Origin, num_rows: int, now_s: float) -> int:
        """Rows of other routers, whose callers are those that are not known here."""
        row_us = replica.load.row_time_us
        done_rows = (now_s - replica.heard_s) * 1e6 / row_us if row_us else 0
        left = max(0, replica.others_rows - int(done_rows))
        own = self._rows.get(replica.life, {})
        callers = max(1, replica.load.callers - len(own))
        return min(left, callers * (own.get(origin, 0) + num_rows))

    def too_late(
        self,
        shipments: Sequence[Shipment],
        replicas: Sequence[Replica],
        origin: Origin,
        times: tuple[float, float],
        in_flight_rows: Callable[[Life], int],
    ) -> dict[str, CannotMakeIt]:
        """Replicas of a plan that could not answer in time, and why.

        Args:
            times: now and the deadline, by the router's clock.
            in_flight_rows: rows a replica has of this router.
        """
        found = {}
        now_s, deadline_s = times
        left_s = deadline_s - now_s
        for shipment, replica in zip(shipments, replicas, strict=True):
            if not replica.others_rows and replica.life not in self._rows:
                continue  # who is idle is asked: what it says of its costs may be old
            before = self.rows_before(replica.life, origin, len(shipment.slots_R))
            before = min(before, in_flight_rows(replica.life))
            before += self._others_before(replica, origin, len(shipment.slots_R), now_s)
            if error := _why_too_late(replica, shipment, before, left_s):
                found[replica.name] = error
        return found


def _why_too_late(
    replica: Replica, shipment: Shipment, rows_before: int, left_s: float
) -> CannotMakeIt | None:
    """The refusal of a call that its replica could not answer in time even if the rows before it
    were one batch; None if it could."""
    if not rows_before:
        return None
    num_rows, costs = len(shipment.slots_R), replica.costs
    drift = 1.0 if replica.has_drifted else replica.load.drift or 1.0  # else it is in the costs
    waiting_us = drift * costs.row_us * rows_before
    own_us = costs.batch_us + costs.expert_us * len(shipment.experts) + costs.row_us * num_rows
    needed_us = waiting_us + drift * own_us
    if needed_us * _MARGIN <= left_s * 1e6:
        return None
    return CannotMakeIt(
        f"replica {replica.name}: behind {rows_before} rows, {num_rows} rows take about "
        f"{needed_us / 1e3:.1f} ms, and {left_s * 1e3:.1f} ms are left; "
        "retry later, give more time or add replicas",
        replica=replica.name,
        needed_ms=f"{needed_us / 1e3:.3f}",
        left_ms=f"{left_s * 1e3:.3f}",
    ).after(min(waiting_us, needed_us * _MARGIN - left_s * 1e6) / 1e6)
