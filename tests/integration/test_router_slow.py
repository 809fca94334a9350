"""What a router does about replicas that are late, silent, or answer nonsense."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from chaos.link import Link
from tests.mesh import MakeCheckpoint, Mesh, Router, stalled
from tests.packing import random_hidden
from tests.router_caller import Routed, RouterCaller, random_routing, refusal
from tests.waiting import until

from expertmesh.experts.replica import Replica
from expertmesh.router.failover import FailoverSettings
from expertmesh.runtime.errors import CorruptAnswer, ExpertUnavailable, InternalError

ROUTING = random_routing(5, 4)
ONE = Routed(torch.zeros(5, 1).long(), torch.ones(5, 1))
"""A single expert: one message."""
NAMES = ("g0#1", "g0#2")
NO_HEDGES = FailoverSettings(hedge_frac=0)
HEDGES = FailoverSettings(hedge_frac=1)
"""From the first message on."""


def spoiled(data: bytes) -> bytes:
    """Long pieces have a wrong byte."""
    if len(data) <= 400:
        return data
    return data[:300] + bytes([data[300] ^ 0xFF]) + data[301:]


@asynccontextmanager
async def two_copies(
    mesh: Mesh, checkpoint: MakeCheckpoint, failover: FailoverSettings | None = None
) -> AsyncIterator[tuple[dict[str, Replica], Router, RouterCaller]]:
    path = checkpoint("mixtral")
    replicas = await mesh.replicas(path, 1, copies=2, deterministic=True)
    router = await mesh.router(path, failover=failover)
    await until(lambda: len(router.core.snapshot.replicas) == 2)
    async with RouterCaller(router.target) as caller:
        yield replicas, router, caller


@asynccontextmanager
async def one_behind_a_gate(
    mesh: Mesh, checkpoint: MakeCheckpoint, failover: FailoverSettings | None = None
) -> AsyncIterator[tuple[Link, Router, RouterCaller]]:
    """g0#1 is reached through the gate, g0#2 directly."""
    path = checkpoint("mixtral")
    gated = await mesh.replica(path, local_socket=False, deterministic=True)
    gate = Link(gated.address)
    async with gate:
        gated.address = gate.address
        await mesh.replica(path, name="g0#2", deterministic=True)
        router = await mesh.router(path, failover=failover)
        await until(lambda: router.core.snapshot.holders[0, 0] == NAMES)
        await until(lambda: router.core.replica("g0#1").state.address == gate.address)
        async with RouterCaller(router.target) as caller:
            yield gate, router, caller


def count(router: Router, name: str) -> float:
    """A counter of the group."""
    counter: Any = getattr(router.core._metrics, name)
    return float(counter.get("g0"))


async def test_a_late_answer_is_asked_of_another_copy_and_the_loser_is_cancelled(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    async with two_copies(mesh, checkpoint, HEDGES) as (replicas, router, caller):
        hidden_TD = random_hidden(5)
        expected_TD = await caller.dispatch(0, hidden_TD, ONE)
        with stalled(replicas["g0#1"]) as one, stalled(replicas["g0#2"]) as two:
            call = asyncio.ensure_future(caller.dispatch(0, hidden_TD, ONE))
            await until(lambda: any(router.in_flight_rows(name) for name in NAMES))
            [first] = [name for name in NAMES if router.in_flight_rows(name)]
            await until(lambda: all(router.in_flight_rows(name) for name in NAMES))
            spare = two if first == "g0#1" else one
            spare.release()
            assert torch.equal(await call, expected_TD)
            await until(lambda: not router.in_flight_rows(first))
            assert not replicas[first].load().queued_rows
        assert count(router, "hedges") >= 1
        assert count(router, "hedges_won") == 1
        assert [router.set_aside(name) for name in NAMES] == ["", ""]


async def test_nothing_is_asked_twice_without_a_budget(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    async with two_copies(mesh, checkpoint, NO_HEDGES) as (replicas, router, caller):
        hidden_TD = random_hidden(5)
        expected_TD = await caller.dispatch(0, hidden_TD, ONE)
        with stalled(replicas["g0#1"]) as one, stalled(replicas["g0#2"]) as two:
            call = asyncio.ensure_future(caller.dispatch(0, hidden_TD, ONE))
            await until(lambda: any(router.in_flight_rows(name) for name in NAMES))
            await asyncio.sleep(0.2)  # late, but not silent
            assert sum(router.in_flight_rows(name) > 0 for name in NAMES) == 1
            one.release()
            two.release()
            assert torch.equal(await call, expected_TD)
        assert count(router, "hedges") == 0


async def test_when_all_are_late_nobody_is_asked_twice(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    settings = FailoverSettings(silent_s=60)
    async with two_copies(mesh, checkpoint, settings) as (replicas, router, caller):
        hidden_TD = random_hidden(5)
        for _ in range(30):  # now it knows what late is
            await caller.dispatch(0, hidden_TD, ONE)
        before = count(router, "hedges")
        with stalled(replicas["g0#1"]), stalled(replicas["g0#2"]):
            calls = [asyncio.ensure_future(caller.dispatch(0, hidden_TD, ONE)) for _ in range(6)]
            await until(lambda: all(router.in_flight_rows(name) for name in NAMES))
            await until(
                lambda: all(map(router.core._shipper.is_late, map(router.core.replica, NAMES)))
            )
            hedged = count(router, "hedges")
            await asyncio.sleep(0.3)
            assert count(router, "hedges") == hedged
        await asyncio.gather(*calls)
        assert hedged - before <= 6


@pytest.mark.parametrize("failover", [HEDGES, NO_HEDGES], ids=["hedges", "no hedges"])
async def test_a_silent_replica_is_set_aside_until_it_answers_a_probe(
    failover: FailoverSettings, mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    async with one_behind_a_gate(mesh, checkpoint, failover) as (gate, router, caller):
        hidden_TD = random_hidden(5)
        expected_TD = await caller.dispatch(0, hidden_TD, ROUTING)
        gate.silence()
        while not router.set_aside("g0#1"):
            for out_TD in await asyncio.gather(
                *(caller.dispatch(0, hidden_TD, ROUTING) for _ in range(4))
            ):
                assert torch.equal(out_TD, expected_TD)
        assert "silent" in router.set_aside("g0#1")
        await asyncio.sleep(0.5)  # heartbeats go on, and do not bring it back
        assert router.set_aside("g0#1")
        assert torch.equal(await caller.dispatch(0, hidden_TD, ROUTING), expected_TD)
        gate.flow()
        await until(lambda: not router.set_aside("g0#1"))
        assert torch.equal(await caller.dispatch(0, hidden_TD, ROUTING), expected_TD)
        assert count(router, "set_asides") == 1


async def test_the_only_holder_stays_however_silent_it_is(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    replica = await mesh.replica(path)
    router = await mesh.router(path)
    async with RouterCaller(router.target) as caller:
        hidden_TD = random_hidden(5)
        expected_TD = await caller.dispatch(0, hidden_TD, ROUTING)
        with stalled(replica) as stall:
            call = asyncio.ensure_future(caller.dispatch(0, hidden_TD, ROUTING))
            await asyncio.sleep(0.6)
            assert router.set_aside("g0#1") == ""
            stall.release()
            assert torch.equal(await call, expected_TD)


async def test_bytes_changed_on_the_way_are_asked_again_and_never_a_number(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    async with one_behind_a_gate(mesh, checkpoint) as (gate, router, caller):
        hidden_TD = random_hidden(5)
        expected_TD = await caller.dispatch(0, hidden_TD, ROUTING)
        gate.back.change = spoiled
        while not router.set_aside("g0#1"):
            for out_TD in await asyncio.gather(
                *(caller.dispatch(0, hidden_TD, ROUTING) for _ in range(4))
            ):
                assert torch.equal(out_TD, expected_TD)
        gate.back.change = bytes
        await until(lambda: not router.set_aside("g0#1"))
        assert torch.equal(await caller.dispatch(0, hidden_TD, ROUTING), expected_TD)


async def test_an_answer_of_another_form_is_asked_again(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    async with two_copies(mesh, checkpoint) as (replicas, router, caller):
        hidden_TD = random_hidden(5)
        expected_TD = await caller.dispatch(0, hidden_TD, ROUTING)
        batcher = replicas["g0#1"]._batcher
        right = batcher._compute
        batcher._compute = lambda rows: right(rows)[1:]
        while not router.set_aside("g0#1"):
            for out_TD in await asyncio.gather(
                *(caller.dispatch(0, hidden_TD, ROUTING) for _ in range(4))
            ):
                assert torch.equal(out_TD, expected_TD)
        assert "answered (dtype, width, bytes)" in router.set_aside("g0#1")
        await asyncio.sleep(0.3)
        assert router.set_aside("g0#1"), "its probes are answered wrong, too"
        batcher._compute = right
        await until(lambda: not router.set_aside("g0#1"))


async def test_alone_it_is_an_error_and_never_a_number(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    replica = await mesh.replica(path)
    router = await mesh.router(path)
    right = replica._batcher._compute
    replica._batcher._compute = lambda rows: right(rows)[1:]
    async with RouterCaller(router.target) as caller:
        error = await refusal(caller.dispatch(0, random_hidden(5), ROUTING))
    assert type(error) is ExpertUnavailable


async def test_what_a_replica_cannot_compute_another_may(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    async with two_copies(mesh, checkpoint) as (replicas, _, caller):
        hidden_TD = random_hidden(5)
        expected_TD = await caller.dispatch(0, hidden_TD, ROUTING)

        def broken(rows: Any) -> torch.Tensor:
            raise RuntimeError("the device is lost")

        replicas["g0#1"]._batcher._compute = broken
        for _ in range(20):
            assert torch.equal(await caller.dispatch(0, hidden_TD, ROUTING), expected_TD)
        replicas["g0#2"]._batcher._compute = broken
        error = await refusal(caller.dispatch(0, hidden_TD, ROUTING))
        assert type(error) is InternalError


def test_a_corrupt_answer_can_be_retried() -> None:
    assert CorruptAnswer.retryable
