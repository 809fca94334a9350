"""Experts that replicas take on and give up while they serve: over real gRPC, with real routers."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from tests.mesh import MakeCheckpoint, Mesh, stalled
from tests.packing import ExpertCaller, pack, random_hidden
from tests.router_caller import RouterCaller, random_routing
from tests.waiting import until

from expertmesh.client.failures import error_of
from expertmesh.experts.replica import Replica
from expertmesh.runtime.errors import (
    DeadlineExceeded,
    ExpertMeshError,
    InsufficientMemory,
    InvalidInput,
    StaleController,
    UnknownExpert,
)
from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.v1 import expert_pb2, placement_pb2_grpc
from expertmesh.v1 import placement_pb2 as pb

ROOM = {"guest_memory_bytes": 1 << 20}
EXPERT_BYTES = 3 * 64 * 96 * 4
LINGER_MS = 100


def rows_for(expert: int, count: int) -> expert_pb2.ComputeRequest:
    """Rows for one expert of layer 1."""
    return pack(random_hidden(count), torch.full((count,), expert), layer=1, id=1).request


class Controlled:
    """A replica's PlacementService."""

    def __init__(self, replica: Replica, epoch: int = 1) -> None:
        self._channel = grpc.aio.insecure_channel(replica.address)
        self._stub: Any = placement_pb2_grpc.PlacementServiceStub(self._channel)
        self.epoch = epoch

    async def __aenter__(self) -> "Controlled":
        return self

    async def __aexit__(self, *ignored: object) -> None:
        await self._channel.close()

    async def _call(self, name: str, request: Any) -> Any:
        try:
            return await getattr(self._stub, name)(request)
        except grpc.RpcError as failure:
            raise error_of(failure) from None

    async def survey(self) -> dict[int, pb.LayerSurvey]:
        found = await self._call("Survey", pb.SurveyRequest(epoch=self.epoch))
        return {own.layer: own for own in found.layers}

    async def add(self, layer: int, expert: int) -> int:
        request = pb.AddExpertRequest(epoch=self.epoch, layer=layer, expert=expert)
        return int((await self._call("AddExpert", request)).holds_version)

    async def drop(self, layer: int, expert: int, linger_ms: int = LINGER_MS) -> int:
        request = pb.DropExpertRequest(
            epoch=self.epoch, layer=layer, expert=expert, linger_ms=linger_ms
        )
        return int((await self._call("DropExpert", request)).holds_version)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx"])
async def test_a_guest_computes_as_at_home_and_leaves(
    mesh: Mesh, checkpoint: MakeCheckpoint, family: str
) -> None:
    path = checkpoint(family)
    home = await mesh.replica(path, "4-7", "g1#1")
    host = await mesh.replica(path, "0-3", "g0#1", **ROOM)
    request = rows_for(6, 5)
    async with (
        mesh.view() as states,
        Controlled(host) as controlled,
        ExpertCaller(host.address) as caller,
        ExpertCaller(home.address) as at_home,
    ):
        assert isinstance(await caller.refused(request), UnknownExpert)
        assert await controlled.add(1, 6) == 1
        await until(lambda: 6 in held(states, "g0#1", 1))
        assert (await caller.ask(request)).rows == (await at_home.ask(request)).rows
        layers = await controlled.survey()
        assert (list(layers[1].experts), list(layers[1].guests)) == ([0, 1, 2, 3, 6], [6])
        assert layers[1].rows[4] == 5
        assert not layers[0].guests
        assert await controlled.add(1, 6) == 1, "it is there already"
        assert await controlled.drop(1, 6) == 2
        await until(lambda: 6 not in held(states, "g0#1", 1))
        assert isinstance(await caller.refused(request), UnknownExpert)
        assert host._loaded.layers[1].experts == (0, 1, 2, 3)  # type: ignore[union-attr]
        assert await controlled.drop(1, 6) == 2, "it is gone already"


def held(states: dict[str, Any], replica: str, layer: int) -> tuple[int, ...]:
    [experts] = [own.experts for own in states[replica].holds if own.layer == layer]
    return tuple(experts)


async def test_a_layer_may_be_all_guests(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    host = await mesh.replica(checkpoint("mixtral"), {0: "0-3"}, "g0#1", **ROOM)  # type: ignore[arg-type]
    request = rows_for(2, 3)
    async with Controlled(host) as controlled, ExpertCaller(host.address) as caller:
        await controlled.add(1, 2)
        assert (await caller.ask(request)).rows
        await controlled.drop(1, 2)
        assert isinstance(await caller.refused(request), UnknownExpert)
        assert host._loaded.layers.keys() == {0}


async def test_what_is_refused(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("mixtral")
    host = await mesh.replica(path, "0-3", "g0#1", guest_memory_bytes=EXPERT_BYTES)
    closed = await mesh.replica(path, "0-3", "g1#1")
    swapping = await mesh.replica(path, "0-3", "g2#1", device_memory_bytes=2 * EXPERT_BYTES, **ROOM)
    async with Controlled(host) as controlled:
        await controlled.add(0, 5)
        refusals: list[tuple[Any, type[ExpertMeshError], str]] = [
            (controlled.add(1, 5), InsufficientMemory, "guest_memory_bytes has 0 B left"),
            (controlled.add(0, 8), UnknownExpert, "the model has no such expert"),
            (controlled.add(9, 0), UnknownExpert, "the model has no such expert"),
            (controlled.drop(0, 1), InvalidInput, "which is of the replica's configuration"),
        ]
        for call, error, text in refusals:
            with pytest.raises(error, match=text):
                await call
    texts = {closed: "guest_memory_bytes has 0 B left", swapping: "takes no guests"}
    for replica, text in texts.items():
        async with Controlled(replica) as controlled:
            with pytest.raises(InsufficientMemory, match=text):
                await controlled.add(0, 5)


async def test_an_older_controller_is_refused(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    host = await mesh.replica(checkpoint("mixtral"), "0-3", "g0#1", **ROOM)
    async with Controlled(host, 3) as new, Controlled(host, 2) as old:
        await old.add(0, 4)
        await new.survey()
        for call in (old.survey(), old.add(0, 5), old.drop(0, 4)):
            with pytest.raises(StaleController, match=r"epoch 2 is over: .* of epoch 3") as caught:
                await call
            assert caught.value.fields["seen"] == "3"
        await new.drop(0, 4)


async def test_one_that_is_asked_for_all_the_time_stays(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    host = await mesh.replica(checkpoint("mixtral"), "0-3", "g0#1", **ROOM)
    request = rows_for(5, 1)
    async with Controlled(host) as controlled, ExpertCaller(host.address) as caller:
        await controlled.add(1, 5)
        dropping = asyncio.ensure_future(controlled.drop(1, 5, linger_ms=200))
        while not dropping.done():
            assert (await caller.ask(request)).rows, "a router that has not heard of it yet"
            await asyncio.sleep(0.01)
        with pytest.raises(DeadlineExceeded, match="still asked for"):
            await dropping
        assert (await controlled.survey())[1].guests == [5]


async def test_rows_queued_before_are_computed_while_a_guest_leaves(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    host = await mesh.replica(checkpoint("mixtral"), "0-3", "g0#1", **ROOM)
    asked = rows_for(5, 4)
    async with Controlled(host) as controlled, ExpertCaller(host.address) as caller:
        await controlled.add(1, 5)
        expected = (await caller.ask(asked)).rows
        with stalled(host) as stall:
            answer = asyncio.ensure_future(caller.ask(asked))
            await until(lambda: stall.num_batches == 1)
            dropping = asyncio.ensure_future(controlled.drop(1, 5))
            await until(lambda: 5 not in host._loaded.experts[1])
            await asyncio.sleep(0.3)
            assert not dropping.done(), "what is queued is not done yet"
            stall.release()
            assert (await answer).rows == expected
            await dropping


async def test_callers_notice_nothing_of_guests_that_come_and_go(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    """Bit-equal answers throughout: deterministic mode."""
    path = checkpoint("mixtral")
    async with Mesh(mesh.redis_url, f"{mesh.name}-det", deterministic=True) as own:
        replicas = await own.replicas(path, 2, **ROOM)
        router = await own.router(path)
        async with RouterCaller(router.target) as caller, Controlled(replicas["g1#1"]) as there:
            hidden_TD, routing = random_hidden(24), random_routing(24, 2)
            expected_TD = await caller.dispatch(0, hidden_TD, routing)
            enough = asyncio.Event()
            calls = 0

            async def keep_calling() -> None:
                nonlocal calls
                while not enough.is_set():
                    assert torch.equal(await caller.dispatch(0, hidden_TD, routing), expected_TD)
                    calls += 1

            async with asyncio.TaskGroup() as callers:
                for _ in range(3):
                    callers.create_task(keep_calling())
                for _ in range(2):
                    for expert in (0, 2):
                        await there.add(0, expert)
                        await until(lambda e=expert: len(router.core.snapshot.holders[0, e]) == 2)  # type: ignore[misc]
                    before = replicas["g1#1"].load().done_rows
                    await until(lambda b=before: replicas["g1#1"].load().done_rows > b)  # type: ignore[misc]
                    for expert in (0, 2):
                        await there.drop(0, expert)
                enough.set()
            assert calls > 10
            assert not router.set_aside("g1#1")


async def test_what_was_given_up_since_is_asked_of_others(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    """The replica's refusal arrives after the news: it is not set aside for it."""
    path: Path = checkpoint("mixtral")
    replicas = await mesh.replicas(path, 2, **ROOM)
    router = await mesh.router(path)
    host = replicas["g1#1"]
    async with RouterCaller(router.target) as caller, Controlled(host) as there:
        hidden_TD, routing = random_hidden(24), random_routing(24, 2)
        expected_TD = await caller.dispatch(0, hidden_TD, routing)
        await there.add(0, 0)
        await until(lambda: len(router.core.snapshot.holders[0, 0]) == 2)
        asked_of = router.core.snapshot.replicas["g1#1"]
        await there.drop(0, 0)
        await until(lambda: len(router.core.snapshot.holders[0, 0]) == 1)
        refusal = UnknownExpert("not here", layer=0, expert=0)
        assert router.core.on_failure(asked_of, refusal), "it may be asked again"
        assert torch.equal(await caller.dispatch(0, hidden_TD, routing), expected_TD)
        assert not router.set_aside("g1#1")


async def test_a_guest_stays_while_routers_cannot_hear_that_it_leaves(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    async with EmbeddedRedis() as server:
        host = await mesh.replica(
            checkpoint("mixtral"), "0-3", "g0#1", redis_url=server.url, **ROOM
        )
        async with Controlled(host) as controlled:
            await controlled.add(1, 5)
    await until(lambda: host._publisher is not None and not host._publisher.connected)
    async with Controlled(host) as controlled, ExpertCaller(host.address) as caller:
        with pytest.raises(DeadlineExceeded, match="it stays"):
            await controlled.drop(1, 5)
        assert (await caller.ask(rows_for(5, 2))).rows
