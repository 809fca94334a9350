"""The router's view of the mesh: what each heartbeat, answer, failure and silence makes of it."""

from typing import Any

import pytest
from tests.fakes import holds, replica_state

from expertmesh.router.snapshot import Snapshot
from expertmesh.v1 import control_pb2 as pb

NOW_S = 50.0


def seen(*states: pb.ReplicaState, at_s: float = NOW_S) -> Snapshot:
    """A snapshot after these heartbeats."""
    snapshot = Snapshot()
    for state in states:
        snapshot = snapshot.with_state(state, at_s)
    return snapshot


def three() -> Snapshot:
    """a: experts 0 and 1, b: 1, c: 1 and 2 of layer 4."""
    held = {"a": [0, 1], "b": [1], "c": [1, 2]}
    return seen(*(replica_state(name, holds=holds({4: ids})) for name, ids in held.items()))


LIFE_A, LIFE_B = ("a", 1), ("b", 1)


def test_nobody_is_known_at_first() -> None:
    assert (Snapshot().version, dict(Snapshot().replicas), dict(Snapshot().holders)) == (0, {}, {})


def test_heartbeats_tell_who_holds_what() -> None:
    snapshot = three()
    assert snapshot.holders == {(4, 0): ("a",), (4, 1): ("a", "b", "c"), (4, 2): ("c",)}
    assert snapshot.version == 3
    replica = snapshot.replicas["a"]
    assert (replica.name, replica.life, replica.heard_s) == ("a", LIFE_A, NOW_S)
    assert replica.takes_work


def test_holders_do_not_depend_on_the_order_of_arrival() -> None:
    states = [replica_state(name, holds=holds({0: [0]})) for name in "cab"]
    assert seen(*states).holders == seen(*reversed(states)).holders == {(0, 0): ("a", "b", "c")}


def test_a_snapshot_never_changes() -> None:
    before = three()
    replicas, holders = dict(before.replicas), dict(before.holders)
    after = (
        before.without("a").without_work_for(LIFE_B, "gone").with_state(replica_state("d"), 60.0)
    )
    assert after.version == 6
    assert (before.version, before.replicas, before.holders) == (3, replicas, holders)
    with pytest.raises(AttributeError):
        before.version = 9  # type: ignore[misc]
    for mapping in (before.replicas, before.holders, Snapshot().replicas):
        with pytest.raises(TypeError):
            mapping["x"] = None  # type: ignore[index]


@pytest.mark.parametrize(
    "old",
    [
        {"incarnation": 2, "sequence": 6},
        {"incarnation": 2, "sequence": 5},
        {"incarnation": 1, "sequence": 99},
    ],
)
def test_older_and_repeated_heartbeats_change_nothing(old: dict[str, Any]) -> None:
    snapshot = seen(replica_state("a", incarnation=2, sequence=6))
    late = replica_state("a", status=pb.REPLICA_STATUS_DRAINING, **old)
    assert snapshot.with_state(late, NOW_S + 1) is snapshot


@pytest.mark.parametrize(
    "new", [{"incarnation": 2, "sequence": 7}, {"incarnation": 3, "sequence": 1}]
)
def test_newer_heartbeats_and_lives_win(new: dict[str, Any]) -> None:
    snapshot = seen(replica_state("a", incarnation=2, sequence=6))
    state = replica_state("a", holds=holds({0: [7]}), **new)
    after = snapshot.with_state(state, NOW_S + 1)
    assert after.replicas["a"].state == state
    assert after.replicas["a"].heard_s == NOW_S + 1
    assert after.holders == {(0, 7): ("a",)}


def test_a_heartbeat_that_only_changes_load_keeps_the_holders() -> None:
    snapshot = three()
    state = replica_state(
        "a", sequence=2, holds=holds({4: [0, 1]}), load=pb.ReplicaLoad(queued_rows=9)
    )
    after = snapshot.with_state(state, NOW_S + 1)
    assert after.holders is snapshot.holders, "routers need not look at it again"
    assert after.replicas["a"].load.queued_rows == 9
    assert after.version == snapshot.version + 1


def test_other_experts_change_the_holders() -> None:
    after = three().with_state(replica_state("a", sequence=2, holds=holds({4: [0, 2]})), NOW_S)
    assert after.holders == {(4, 0): ("a",), (4, 1): ("b", "c"), (4, 2): ("a", "c")}


def test_a_draining_replica_gets_no_work_but_is_still_there() -> None:
    draining = replica_state("a", sequence=2, status=pb.REPLICA_STATUS_DRAINING)
    after = three().with_state(draining, NOW_S)
    assert after.holders == {(4, 1): ("b", "c"), (4, 2): ("c",)}
    assert not after.replicas["a"].takes_work
    still = after.with_state(replica_state("a", sequence=3, status=draining.status), NOW_S)
    assert still.holders == after.holders


def test_a_replica_set_aside_gets_no_work_until_a_newer_heartbeat() -> None:
    before = three()
    aside = before.without_work_for(LIFE_A, "stream broke")
    assert aside.replicas["a"].set_aside == "stream broke"
    assert (4, 0) not in aside.holders
    assert aside.version == before.version + 1
    same = replica_state("a", holds=holds({4: [0, 1]}))
    assert aside.with_state(same, NOW_S + 1) is aside, "that heartbeat was there before"
    newer = replica_state("a", sequence=2, holds=holds({4: [0, 1]}))
    back = aside.with_state(newer, NOW_S + 1)
    assert back.replicas["a"].set_aside == ""
    assert back.holders == before.holders


def test_answers_do_not_bring_a_replica_back() -> None:
    aside = three().without_work_for(LIFE_A, "stream broke")
    after = aside.with_loads([(LIFE_A, pb.ReplicaLoad(queued_rows=1), 0)], NOW_S + 1)
    assert after.replicas["a"].set_aside == "stream broke"
    assert after.holders is aside.holders


def test_the_first_reason_to_set_aside_stays() -> None:
    aside = three().without_work_for(LIFE_A, "first")
    assert aside.without_work_for(LIFE_A, "second") is aside


def test_failures_of_a_former_life_do_not_concern_the_present_one() -> None:
    snapshot = seen(replica_state("a", incarnation=2))
    assert snapshot.without_work_for(("a", 1), "broke") is snapshot
    assert snapshot.with_loads([(("a", 1), pb.ReplicaLoad(), 0)], NOW_S) is snapshot
    assert snapshot.with_loads([(("nobody", 1), pb.ReplicaLoad(), 0)], NOW_S) is snapshot
    assert snapshot.without_work_for(("nobody", 1), "broke") is snapshot


def test_an_answer_carries_fresher_load() -> None:
    before = three()
    after = before.with_loads([(LIFE_B, pb.ReplicaLoad(queued_rows=5), 2)], NOW_S + 2)
    replica = after.replicas["b"]
    assert (replica.load.queued_rows, replica.heard_s) == (5, NOW_S + 2)
    assert replica.others_rows == 3
    assert replica.state is before.replicas["b"].state
    assert after.holders is before.holders
    assert after.version == before.version + 1


def test_a_replica_that_left_is_gone() -> None:
    before = three()
    after = before.without("c")
    assert set(after.replicas) == {"a", "b"}
    assert after.holders == {(4, 0): ("a",), (4, 1): ("a", "b")}
    assert after.version == before.version + 1
    assert after.without("c") is after


def test_a_heartbeat_that_an_answer_has_overtaken_leaves_the_load() -> None:
    answered = seen(replica_state("a")).with_loads(
        [(LIFE_A, pb.ReplicaLoad(queued_rows=5, done_rows=90), 1)], NOW_S + 1
    )
    older = replica_state("a", sequence=2, load=pb.ReplicaLoad(queued_rows=70, done_rows=20))
    replica = answered.with_state(older, NOW_S + 2).replicas["a"]
    assert (replica.load.queued_rows, replica.others_rows) == (5, 4)
    assert (replica.heard_s, replica.state.sequence) == (NOW_S + 1, 2)
    newer = replica_state("a", sequence=3, load=pb.ReplicaLoad(queued_rows=8, done_rows=95))
    replica = answered.with_state(newer, NOW_S + 2, own_rows=6).replicas["a"]
    assert (replica.load.queued_rows, replica.others_rows, replica.heard_s) == (8, 2, NOW_S + 2)


def test_an_unusable_heartbeat_sets_aside_and_a_good_one_brings_back() -> None:
    wrong = three().with_state(replica_state("a", sequence=2), NOW_S, set_aside="address: none")
    assert wrong.replicas["a"].set_aside == "address: none"
    assert (4, 0) not in wrong.holders
    good = replica_state("a", sequence=3, holds=holds({4: [0, 1]}))
    assert wrong.with_state(good, NOW_S).holders == three().holders


def test_a_distrusted_replica_comes_back_when_it_claims_something_else() -> None:
    aside = three().without_work_for(LIFE_A, "lies", "claims")
    same = aside.with_state(replica_state("a", sequence=2, holds=holds({4: [0, 1]})), NOW_S)
    answered = same.with_loads([(LIFE_A, pb.ReplicaLoad(), 0)], NOW_S)
    again = answered.with_state(replica_state("a", sequence=3, holds=holds({4: [0, 1]})), NOW_S)
    assert again.replicas["a"].set_aside == "lies"
    assert (4, 0) not in again.holders
    other = again.with_state(replica_state("a", sequence=4, holds=holds({4: [0]})), NOW_S)
    assert other.holders[4, 0] == ("a",)
    reborn = again.with_state(replica_state("a", incarnation=2, holds=holds({4: [0]})), NOW_S)
    assert reborn.replicas["a"].set_aside == ""


def test_a_broken_replica_comes_back_when_it_answers_a_probe() -> None:
    aside = three().without_work_for(LIFE_A, "stream broke", "probe")
    beating = aside.with_state(replica_state("a", sequence=2, holds=holds({4: [0, 1]})), NOW_S)
    assert beating.replicas["a"].set_aside == "stream broke"
    assert (4, 0) not in beating.holders
    assert beating.with_probed(("a", 2)) is beating
    assert beating.with_probed(LIFE_B) is beating
    assert beating.with_probed(LIFE_A).holders == three().holders
    reborn = beating.with_state(replica_state("a", incarnation=2, holds=holds({4: [0]})), NOW_S)
    assert reborn.replicas["a"].set_aside == ""


def test_a_probe_does_not_bring_back_who_waits_for_something_else() -> None:
    for until in ("heartbeat", "claims"):
        aside = three().without_work_for(LIFE_A, "draining", until)
        assert aside.with_probed(LIFE_A) is aside


def test_spare_is_who_has_another_holder_for_everything() -> None:
    assert [three().is_spare(name) for name in "abc"] == [False, True, False]
    assert not three().without_work_for(LIFE_A, "x").without_work_for(("c", 1), "x").is_spare("b")
