"""What a router does when replicas die, leave or cannot be reached, and when Redis goes away."""

import asyncio
import itertools
import logging
import os
import signal
import time
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
from expertmesh.runtime.errors import ExpertUnavailable
from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.runtime.state import MeshWatcher

TOLERANCE = 1e-5
"""Rows of several callers in one fp32 product: other kernels, other last bits."""
_numbers = itertools.count()
ROUTING = random_routing(5, 4)
"""Rows for most experts of both groups."""


@pytest.fixture(params=[True, False], ids=["local_socket", "grpc"])
async def both(
    request: pytest.FixtureRequest, redis_url: str, one_thread: None, restored_logging: None
) -> AsyncIterator[Mesh]:
    """A mesh whose router calls over Unix sockets, and one where it calls over gRPC."""
    name = f"both-{next(_numbers)}"
    async with Mesh(redis_url, name, local_socket=request.param) as empty:
        yield empty


@asynccontextmanager
async def two_copies(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> AsyncIterator[tuple[dict[str, Replica], Router, RouterCaller]]:
    path = checkpoint("mixtral")
    replicas = await mesh.replicas(path, 2, copies=2)
    router = await mesh.router(path)
    await until(lambda: len(router.core.snapshot.replicas) == 4)
    async with RouterCaller(router.target) as caller:
        yield replicas, router, caller


async def test_a_lone_call_moves_to_the_other_copy_with_equal_bits(
    both: Mesh, checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    async with two_copies(both, checkpoint) as (replicas, router, caller):
        hidden_TD = random_hidden(5)
        expected_TD = await caller.dispatch(0, hidden_TD, ROUTING)
        with stalled(replicas["g0#1"]), stalled(replicas["g0#2"]) as other:
            call = asyncio.ensure_future(caller.dispatch(0, hidden_TD, ROUTING))
            names = ("g0#1", "g0#2")
            await until(lambda: any(router.in_flight_rows(name) for name in names))
            [asked] = [name for name in names if router.in_flight_rows(name)]
            [spared] = [name for name in names if name != asked]
            await both.kill(replicas[asked])
            await until(lambda: router.in_flight_rows(spared) > 0)
            assert "broke" in router.set_aside(asked)
            other.release()
        with stalled(replicas[spared]) as spare:
            spare.release()
            assert torch.equal(await call, expected_TD)
        assert torch.equal(await caller.dispatch(0, hidden_TD, ROUTING), expected_TD)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_replica_killed_under_load_loses_nothing(
    both: Mesh, checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    async with two_copies(both, checkpoint) as (replicas, router, caller):
        inputs = {seed: random_hidden(5, seed) for seed in range(6)}
        expected = {
            seed: await caller.dispatch(0, hidden_TD, ROUTING) for seed, hidden_TD in inputs.items()
        }
        answered = 0
        enough = asyncio.Event()

        async def keep_calling(seed: int) -> None:
            nonlocal answered
            while not enough.is_set():
                out_TD = await caller.dispatch(0, inputs[seed], ROUTING)
                torch.testing.assert_close(out_TD, expected[seed], rtol=0, atol=TOLERANCE)
                answered += 1

        async with asyncio.TaskGroup() as callers:
            for seed in inputs:
                callers.create_task(keep_calling(seed))
            for name in ("g0#1", "g1#2"):
                before = answered
                await until(lambda n=before: answered > n + 30)  # type: ignore[misc]
                await both.kill(replicas[name])
            before = answered
            await until(lambda: answered > before + 30)
            await until(lambda: all(router.set_aside(name) for name in ("g0#1", "g1#2")))
            enough.set()
        assert not router.core.missing()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_no_copy_left_is_said_fast_and_by_name(
    both: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    replicas = await both.replicas(path, 2)
    router = await both.router(path)
    low, high = (Routed(torch.tensor([[e, e + 1]]), torch.ones(1, 2)) for e in (0, 6))
    async with RouterCaller(router.target) as caller:
        await caller.dispatch(1, random_hidden(1), high)
        await both.kill(replicas["g1#1"])
        for _ in range(3):  # at the broken stream, from then on by the snapshot
            started_s = time.monotonic()
            error = await refusal(caller.dispatch(1, random_hidden(1), high))
            assert time.monotonic() - started_s < 1
            assert type(error) is ExpertUnavailable
            assert error.retryable
            assert error.fields.items() >= {"model": "tiny", "layer": "1", "expert": "6"}.items()
            assert "g1#1" in error.fields["cause"] or "announced" in error.fields["cause"]
            assert "layer 1, expert 6" in error.message
        await caller.dispatch(1, random_hidden(1), low)
        assert router.core.missing() == [(layer, e) for layer in (0, 1) for e in range(4, 8)]
        await both.replica(path, "4-7", "g1#2")
        await router.core.wait_complete(5)
        await caller.dispatch(1, random_hidden(1), high)


async def test_a_replica_set_aside_is_back_when_it_answers_a_probe(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    # it beats when told to
    replica = await mesh.replica(path, heartbeat_s=60, lease_s=180, local_socket=False)
    async with Link(replica.address) as link:
        replica.address = link.address
        announce(replica)
        await until_announced(mesh, replica, link.address)
        router = await mesh.router(path)
        async with RouterCaller(router.target) as caller:
            hidden_TD = random_hidden(5)
            expected_TD = await caller.dispatch(0, hidden_TD, ROUTING)
            await link.cut()
            for _ in range(4):
                error = await refusal(caller.dispatch(0, hidden_TD, ROUTING))
                assert type(error) is ExpertUnavailable
                assert link.address in router.set_aside("g0#1")
                [view] = (await caller.snapshot()).replicas
                assert view.set_aside == router.set_aside("g0#1")
                sequence = router.core.snapshot.replicas["g0#1"].state.sequence
                announce(replica)
                await until(  # a heartbeat says that it lives, not that we can reach it
                    lambda before=sequence: (  # type: ignore[misc]
                        router.core.snapshot.replicas["g0#1"].state.sequence > before
                    )
                )
            await link.mend()
            await until(lambda: not router.set_aside("g0#1"))
            assert torch.equal(await caller.dispatch(0, hidden_TD, ROUTING), expected_TD)


def announce(replica: Replica) -> None:
    assert replica._publisher is not None
    replica._publisher.announce()


async def until_announced(mesh: Mesh, replica: Replica, address: str) -> None:
    """Until Redis has the address."""
    addresses: list[str] = []
    async with MeshWatcher(
        mesh.redis_url, mesh.name, lambda state: addresses.append(state.address), print
    ):
        await until(lambda: address in addresses)


async def test_a_call_that_waits_for_a_connection_moves_on_when_its_replica_is_gone(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    await mesh.replica(path, local_socket=False)
    router = await mesh.router(path)
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1")
    state = type(router.core.snapshot.replicas["g0#1"].state)()
    state.CopyFrom(router.core.snapshot.replicas["g0#1"].state)
    state.replica = "g0#2"
    state.address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    async with RouterCaller(router.target) as caller, silent:
        hidden_TD = random_hidden(5)
        expected_TD = await caller.dispatch(0, hidden_TD, ROUTING)
        router.core.on_state(state)
        calls = []
        while router.in_flight_rows("g0#2") == 0:  # the other replica may win some
            calls.append(asyncio.ensure_future(caller.dispatch(0, hidden_TD, ROUTING)))
            await asyncio.sleep(0.01)
        router.core.on_gone("g0#2")
        for out_TD in await asyncio.gather(*calls):
            torch.testing.assert_close(out_TD, expected_TD, rtol=0, atol=TOLERANCE)


async def test_redis_may_die_while_calls_go_on(checkpoint: MakeCheckpoint, mesh: Mesh) -> None:
    path = checkpoint("mixtral")
    async with EmbeddedRedis() as redis, Mesh(redis.url, "outage") as own:
        await own.replicas(path, 2, lease_s=1)
        router = await own.router(path)
        async with RouterCaller(router.target) as caller:
            hidden_TD = random_hidden(5)
            expected_TD = await caller.dispatch(0, hidden_TD, ROUTING)
            assert (await caller.snapshot()).redis_connected
            os.kill(redis.pid, signal.SIGKILL)
            await until(lambda: not router.watcher.connected)
            started_s = time.monotonic()
            while time.monotonic() - started_s < 1.2:  # longer than the lease
                assert torch.equal(await caller.dispatch(0, hidden_TD, ROUTING), expected_TD)
            snapshot = await caller.snapshot()
            assert not snapshot.redis_connected
            assert snapshot.redis_age_ms > 1000
            assert [view.set_aside for view in snapshot.replicas] == ["", ""]
            assert all(view.age_ms < 1000 for view in snapshot.replicas), "answers carry load"
            async with EmbeddedRedis(port=redis.port):
                await until(lambda: router.watcher.connected)
                assert (await caller.snapshot()).redis_connected
                assert torch.equal(await caller.dispatch(0, hidden_TD, ROUTING), expected_TD)


async def test_a_replica_is_replaced_under_load_without_a_failed_call(
    both: Mesh, checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoint("mixtral")
    old = await both.replica(path, name="g0#1")
    router = await both.router(path)
    async with RouterCaller(router.target) as caller:
        inputs = {seed: random_hidden(5, seed) for seed in range(4)}
        expected = {
            seed: await caller.dispatch(0, hidden_TD, ROUTING) for seed, hidden_TD in inputs.items()
        }
        enough = asyncio.Event()

        async def keep_calling(seed: int) -> None:
            while not enough.is_set():
                out_TD = await caller.dispatch(0, inputs[seed], ROUTING)
                torch.testing.assert_close(out_TD, expected[seed], rtol=0, atol=TOLERANCE)

        async with asyncio.TaskGroup() as callers:
            for seed in inputs:
                callers.create_task(keep_calling(seed))
            for number in (2, 3, 4):
                new = await both.replica(path, name=f"g0#{number}")
                await until(lambda n=number: f"g0#{n}" in router.core.snapshot.replicas)  # type: ignore[misc]
                await old.drain_and_stop()
                assert old.load().done_rows > 0
                old = new
            enough.set()
        assert router.core.snapshot.replicas.keys() == {"g0#4"}
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_replica_that_claims_experts_it_has_not_is_set_aside(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    await mesh.replica(path)
    liar = await mesh.replica(path, experts="0-1", name="g1#1")
    router = await mesh.router(path)
    await until(lambda: "g1#1" in router.core.snapshot.replicas)
    async with RouterCaller(router.target) as caller:
        hidden_TD = random_hidden(5)
        expected_TD = await caller.dispatch(0, hidden_TD, ROUTING)
        claims: Any = liar._loaded.experts
        claims[0] = tuple(range(8))  # what requests are checked against stays as it was
        await until(lambda: router.core.snapshot.holders[0, 7] == ("g0#1", "g1#1"))
        for _ in range(50):
            assert torch.equal(await caller.dispatch(0, hidden_TD, ROUTING), expected_TD)
            if router.set_aside("g1#1"):
                break
        assert "it has not what it claims to have" in router.set_aside("g1#1")
        await asyncio.sleep(0.5)  # more heartbeats with the same claim
        assert router.set_aside("g1#1")
        assert torch.equal(await caller.dispatch(0, hidden_TD, ROUTING), expected_TD)
