"""What a router refuses itself: calls that no replica could answer in time."""

from collections.abc import Callable

import pytest
from tests.fakes import replica_state

from expertmesh.router.backlog import Backlog
from expertmesh.router.plan import Shipment
from expertmesh.router.snapshot import Life, Replica, Snapshot
from expertmesh.runtime.errors import CannotMakeIt
from expertmesh.runtime.origin import Origin, Priority
from expertmesh.v1 import control_pb2

A, B = Origin("a"), Origin("b")
SLOW = Origin("a", Priority.BATCH)
LIFE = ("r0", 1)
NOW_S = 100.0


def replica(**load: float) -> Replica:
    """One that needs a millisecond for a row."""
    values = {"row_cost_us": 1000.0, "row_time_us": 1000.0} | load
    own = replica_state(load=control_pb2.ReplicaLoad(**values))  # type: ignore[arg-type]
    return Snapshot().with_state(own, NOW_S).replicas["r0"]


def shipment(rows: int) -> Shipment:
    return Shipment("r0", [0], [rows], list(range(rows)))


def late(
    backlog: Backlog,
    origin: Origin,
    left_s: float,
    own: Replica | None = None,
    in_flight: Callable[[Life], int] = lambda life: 10**6,
) -> CannotMakeIt | None:
    """Why a call of ten rows is refused."""
    found = backlog.too_late(
        [shipment(10)], [own or replica()], origin, (NOW_S, NOW_S + left_s), in_flight
    )
    return found.get("r0")


def backlog_of(*rows: tuple[Origin, int]) -> Backlog:
    backlog = Backlog()
    for origin, num_rows in rows:
        backlog.add(LIFE, origin, num_rows)
    return backlog


def test_rows_before_are_those_of_a_fair_queue() -> None:
    backlog = backlog_of((A, 60), (SLOW, 7), (A, 40))
    assert backlog.rows_before(LIFE, A, 5) == 100
    assert backlog.rows_before(LIFE, B, 5) == 5
    assert backlog.rows_before(LIFE, SLOW, 5) == 107
    assert backlog.rows_before(("r1", 1), A, 5) == 0
    backlog.remove(LIFE, A, 60)
    assert backlog.rows_before(LIFE, A, 5) == 40
    backlog.remove(LIFE, A, 40)
    backlog.remove(LIFE, SLOW, 7)
    assert backlog.rows_before(LIFE, A, 5) == 0


def test_who_would_be_late_is_told_when_to_come_again() -> None:
    backlog = backlog_of((A, 90))
    assert late(backlog, A, 0.2) is None
    assert late(backlog, B, 0.05) is None, "b is not behind a"
    error = late(backlog, A, 0.05)
    assert error is not None
    assert error.message.startswith("replica r0: behind 90 rows, 10 rows take about 100.0 ms")
    assert error.retry_after_s == pytest.approx(0.09)
    assert late(backlog, A, 0.05, in_flight=lambda life: 0) is None, "all is answered"
    assert late(backlog, A, 0.2, replica(drift=3.0)) is not None


def test_an_idle_replica_is_asked() -> None:
    assert late(Backlog(), A, 1e-6) is None


def test_rows_of_other_routers_count_as_those_of_the_callers_that_are_not_known() -> None:
    own = replica(queued_rows=1000)
    assert own.others_rows == 1000
    assert late(Backlog(), A, 0.02, own) is not None
    assert late(Backlog(), A, 0.03, own) is None
    crowded = replica(queued_rows=1000, callers=5)
    assert late(Backlog(), A, 0.07, crowded) is not None
    assert late(Backlog(), A, 0.09, crowded) is None
    assert late(Backlog(), A, 0.07, replica(queued_rows=20, callers=5)) is None
