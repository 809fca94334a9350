"""ControlService: the core's snapshot as people see it."""

import pytest
from tests.fakes import FakeClock, holds, replica_state

from expertmesh.router.control import ControlServicer
from expertmesh.router.core import RouterCore
from expertmesh.router.plan import slots_by_expert
from expertmesh.runtime.state.scaling import ScalingBoard
from expertmesh.runtime.telemetry import configure
from expertmesh.v1 import control_pb2 as pb

NO_CONTEXT = None
NO_BOARD = ScalingBoard("redis://127.0.0.1:1", "prod")
"""Nothing is asked of it here."""


def router_core(clock: FakeClock) -> RouterCore:
    """A core of the model "demo" that knows nobody and has sent nothing."""
    telemetry = configure("router", None)
    return RouterCore("demo", {0: 4}, telemetry, max_message_bytes=1 << 20, clock=clock)


async def test_replicas_as_last_seen() -> None:
    clock = FakeClock()
    core = router_core(clock)
    for name in ("b", "a"):
        core.on_state(replica_state(name, holds=holds({0: [0, 1]})))
    core.on_state(replica_state("c", model="another"))
    clock.advance(0.25)
    loaded = pb.ReplicaLoad(queued_rows=7)
    core.snapshot = core.snapshot.with_loads([(("a", 1), loaded, 0)], clock()).without_work_for(
        ("b", 1), "stream broke"
    )
    clock.advance(0.5)
    control = ControlServicer("prod", core, NO_BOARD, lambda: (True, 0.1), clock)
    seen = await control.GetSnapshot(pb.GetSnapshotRequest(), NO_CONTEXT)
    assert (seen.version, seen.mesh) == (core.snapshot.version, "prod")
    assert (seen.redis_connected, seen.redis_age_ms) == (True, 100)
    a, b = seen.replicas
    assert (a.state.replica, a.age_ms, a.set_aside, a.in_flight_rows) == ("a", 500, "", 0)
    assert (b.state.replica, b.age_ms, b.set_aside) == ("b", 750, "stream broke")
    assert a.state.load == loaded, "the answer's, not the heartbeat's"
    assert core.snapshot.replicas["a"].state.load == pb.ReplicaLoad(), "which stays as it was"


@pytest.mark.parametrize(("age_s", "age_ms"), [(1e6, 10**9), (float("inf"), 4 * 10**9)])
async def test_a_redis_that_was_never_there_has_a_finite_age(age_s: float, age_ms: int) -> None:
    clock = FakeClock()
    control = ControlServicer("prod", router_core(clock), NO_BOARD, lambda: (False, age_s), clock)
    seen = await control.GetSnapshot(pb.GetSnapshotRequest(), NO_CONTEXT)
    assert (seen.redis_connected, seen.redis_age_ms) == (False, age_ms)


async def test_experts_nobody_takes_work_for() -> None:
    clock = FakeClock()
    core = RouterCore(
        "demo", {0: 4, 2: 2}, configure("router", None), max_message_bytes=1 << 20, clock=clock
    )
    control = ControlServicer("prod", core, NO_BOARD, lambda: (True, 0.1), clock)
    core.on_state(replica_state("a", holds=holds({0: [0, 1, 3]})))
    seen = await control.GetSnapshot(pb.GetSnapshotRequest(), NO_CONTEXT)
    assert list(seen.missing) == holds({0: [2], 2: [0, 1]})
    core.on_state(replica_state("b", holds=holds({0: [2], 2: [0, 1]})))
    seen = await control.GetSnapshot(pb.GetSnapshotRequest(), NO_CONTEXT)
    assert not seen.missing


async def test_rows_routed() -> None:
    core = router_core(FakeClock())
    core.usage.count(0, slots_by_expert([3, 3, 0], range(3)))
    control = ControlServicer("prod", core, NO_BOARD, lambda: (True, 0.0))
    used = await control.GetExpertUsage(pb.GetExpertUsageRequest(), NO_CONTEXT)
    assert used == pb.GetExpertUsageResponse(layers=[pb.LayerUsage(layer=0, rows=[1, 0, 0, 2])])
