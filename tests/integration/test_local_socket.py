"""Routers on a replica's host call it over a Unix socket: the same answers, errors, endings."""

import asyncio
import logging
from typing import Any

import pytest
import torch
from tests.mesh import MODEL, MakeCheckpoint, Mesh, stalled
from tests.packing import pack, random_hidden
from tests.router_caller import RouterCaller, random_routing
from tests.waiting import until

from expertmesh.experts.replica import Replica
from expertmesh.router import links
from expertmesh.router.links import GrpcLink, LocalLink
from expertmesh.router.streams import ReplicaStream
from expertmesh.runtime import frames
from expertmesh.runtime.errors import ExpertMeshError, MessageTooLarge, UnknownExpert

MOST_BYTES = 1 << 20


def stream_to(replica: Replica, *, local: bool = True) -> ReplicaStream:
    socket = replica.state().local_socket
    stream = ReplicaStream(replica.address, MOST_BYTES, socket if local else "")
    assert isinstance(stream._link, LocalLink if local else GrpcLink)
    return stream


async def ask(stream: ReplicaStream, num_tokens: int, layer: int = 0, experts: int = 8) -> Any:
    """What the replica answers: (response, rows [T, D] of one expert each) or an error."""
    random = torch.Generator().manual_seed(num_tokens)
    experts_T = torch.randint(experts, (num_tokens,), generator=random)
    packed = pack(random_hidden(num_tokens), experts_T, layer=layer, model=MODEL)
    header, rows = packed.request, packed.request.rows
    header.ClearField("rows")
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    stream.send(header, [memoryview(rows)], num_tokens, 10.0, answer.set_result)
    return await answer


async def test_both_ways_give_equal_bits(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    local, grpc = stream_to(replica), stream_to(replica, local=False)
    for num_tokens in (1, 2, 3, 9, 40, 400, 1):
        answers = [await ask(stream, num_tokens) for stream in (local, grpc)]
        assert bytes(answers[0][1]) == bytes(answers[1][1])
        assert [answer[0].hidden_size for answer in answers] == [64, 64]
    assert local.in_flight_rows == grpc.in_flight_rows == 0
    await local.close()
    await grpc.close()


async def test_a_router_takes_the_socket_and_falls_back_to_grpc(
    mesh: Mesh, checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("mixtral")
    await mesh.replicas(path, 2)
    opened = []

    def dial(name: str) -> Any:
        opened.append(name)
        return frames.dial(name) if len(opened) % 2 else None  # as if it were another host

    monkeypatch.setattr(links, "dial", dial)
    router = await mesh.router(path)
    async with RouterCaller(router.target) as caller:
        out_TD = await caller.dispatch(0, random_hidden(9), random_routing(9, 2))
    kinds = {type(stream._link) for stream in router.core._shipper._streams.values()}
    assert kinds == {LocalLink, GrpcLink}
    assert bool(torch.isfinite(out_TD).all())


async def test_errors_are_the_replicas_own_and_the_next_request_is_fine(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    replica = await mesh.replica(checkpoint("mixtral"), "0-3")
    stream = stream_to(replica)
    error = await ask(stream, 5, layer=7)
    assert type(error) is UnknownExpert
    with pytest.raises(MessageTooLarge):
        await ask(stream, MOST_BYTES // 64)
    assert not isinstance(await ask(stream, 5, experts=4), ExpertMeshError)
    await stream.close()


async def test_nonsense_ends_one_connection_and_no_other(
    mesh: Mesh, checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    good = stream_to(replica)
    sock = frames.dial(replica.state().local_socket)
    assert sock is not None
    with caplog.at_level(logging.WARNING):
        await asyncio.get_running_loop().sock_sendall(sock, b"\5\0\0\0hello")
        assert await asyncio.get_running_loop().sock_recv(sock, 100) == b""
    sock.close()
    assert "a local connection broke: 5 bytes are not a expertmesh.v1.ComputeRequest" in caplog.text
    assert not isinstance(await ask(good, 3), ExpertMeshError)
    await good.close()


async def test_a_stopping_replica_answers_what_it_has(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    stream = stream_to(replica)
    with stalled(replica) as stall:
        asked = [asyncio.ensure_future(ask(stream, 300)) for _ in range(5)]
        await until(lambda: replica.load().queued_rows == 1500)
        stopping = asyncio.ensure_future(mesh.stop_replicas())
        await asyncio.sleep(0.2)
        stall.release()
        answers = await asyncio.gather(*asked)
        await stopping
    assert not any(isinstance(answer, ExpertMeshError) for answer in answers)
    await until(lambda: stream.closed)


async def test_it_can_be_switched_off(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    replica = await mesh.replica(checkpoint("mixtral"), local_socket=False)
    assert replica.state().local_socket == ""
