"""The error about missing experts: which one, and why it is missing."""

import pytest
from tests.fakes import holds, replica_state

from expertmesh.router.missing import expert_unavailable, missing_in, why_missing
from expertmesh.router.snapshot import Snapshot
from expertmesh.runtime.error_status import from_status
from expertmesh.runtime.errors import (
    CannotMakeIt,
    ExpertMeshError,
    ExpertUnavailable,
    QueueFull,
    StreamClosed,
    WeightsUnavailable,
)
from expertmesh.v1 import control_pb2

BROKE = StreamClosed("the stream to 10.0.0.1:1 broke")
FULL = QueueFull("65536 rows wait")


def seen(**held: list[int]) -> Snapshot:
    """Replicas and what they hold in layer 2."""
    snapshot = Snapshot()
    for name, experts in held.items():
        snapshot = snapshot.with_state(replica_state(name, holds=holds({2: experts})), 1.0)
    return snapshot


def why(snapshot: Snapshot, missing: list[int], **failed: ExpertMeshError) -> ExpertMeshError:
    return why_missing("demo", 2, missing, snapshot, failed)


def test_nobody_has_announced_it() -> None:
    error = why(seen(a=[0]), [3])
    assert type(error) is ExpertUnavailable
    assert error.message == (
        "model demo, layer 2, expert 3: no live replica holds it: no replica has announced it; "
        "`expertmesh status` shows what is missing"
    )
    assert error.fields == {
        "model": "demo",
        "layer": "2",
        "expert": "3",
        "missing": "3",
        "cause": "no replica has announced it",
    }


def test_it_failed_in_this_call() -> None:
    aside = seen(a=[3]).without_work_for(("a", 1), BROKE.message)
    assert why(aside, [3], a=BROKE).fields["cause"] == f"a failed: {BROKE.message}"


def test_all_holders_are_set_aside() -> None:
    snapshot = seen(a=[3], b=[3], c=[0])
    for name in "ab":
        snapshot = snapshot.without_work_for((name, 1), f"{name} broke")
    cause = why(snapshot, [3]).fields["cause"]
    assert cause == "all 2 holders are set aside: a: a broke; b: b broke"


def test_one_failed_and_the_other_was_set_aside() -> None:
    snapshot = seen(a=[3], b=[3]).without_work_for(("b", 1), "b broke")
    assert why(snapshot, [3], a=BROKE).fields["cause"] == f"a failed: {BROKE.message}; b: b broke"


def test_the_only_holder_is_draining() -> None:
    leaving = replica_state("a", holds=holds({2: [3]}), status=control_pb2.REPLICA_STATUS_DRAINING)
    cause = why(Snapshot().with_state(leaving, 1.0), [3]).fields["cause"]
    assert cause == "its only holder is set aside: a: it is draining"


def test_many_reasons_are_cut_short() -> None:
    snapshot = seen(**{f"r{number}": [3] for number in range(5)})
    for number in range(5):
        snapshot = snapshot.without_work_for((f"r{number}", 1), "broke")
    cause = why(snapshot, [3]).fields["cause"]
    assert cause == "all 5 holders are set aside: r0: broke; r1: broke; r2: broke; and 2 more"


@pytest.mark.parametrize("error", [FULL, WeightsUnavailable("no memory")])
def test_a_replica_that_is_well_says_why_itself(error: ExpertMeshError) -> None:
    assert why(seen(a=[3]), [3], a=error) is error


def test_of_several_refusals_the_one_with_the_shortest_delay_is_told() -> None:
    soon, later = QueueFull("soon").after(0.1), CannotMakeIt("later").after(0.2)
    empty = WeightsUnavailable("empty")
    snapshot = seen(a=[3], b=[3], c=[3, 4], d=[4])
    assert why(snapshot, [3, 4], a=empty, b=later, c=BROKE, d=soon) is soon
    assert why(snapshot, [3, 4], a=empty, b=FULL, c=later) is later
    assert why(snapshot, [3], a=BROKE, b=empty, c=BROKE) is empty


def test_the_dead_are_told_before_the_busy() -> None:
    found = why(seen(a=[0], b=[3]), [0, 3, 5], a=FULL, b=BROKE)
    assert type(found) is ExpertUnavailable
    assert found.fields["expert"] == "3"
    assert missing_in(found) == {3, 5}
    assert "expert 3 (and 1 more): no live replica" in found.message


def test_what_is_missing_survives_the_wire() -> None:
    error = from_status(expert_unavailable("demo", 2, [5, 1], "because").to_status())
    assert isinstance(error, ExpertUnavailable)
    assert missing_in(error) == {1, 5}
    assert missing_in(ExpertUnavailable("of somebody else", layer=1, expert=4)) == {4}
