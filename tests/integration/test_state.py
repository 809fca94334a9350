"""The mesh's live state through a real server: arrival, departure, leases, outages and garbage."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis
from tests.fakes import replica_state as record
from tests.waiting import until

from expertmesh.runtime.errors import ConfigError, MalformedMessage
from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.runtime.state import (
    MeshWatcher,
    ReplicaPublisher,
    channel_name,
    replica_key,
)
from expertmesh.runtime.state.link import connect
from expertmesh.v1 import control_pb2 as pb

MESH = "test"


class View:
    """What a router would know: the newest state of each replica, and every departure."""

    def __init__(self) -> None:
        self.states: dict[str, pb.ReplicaState] = {}
        self.history: list[pb.ReplicaState] = []
        self.gone: list[str] = []

    def on_state(self, state: pb.ReplicaState) -> None:
        self.states[state.replica] = state
        self.history.append(state)

    def on_gone(self, replica: str) -> None:
        del self.states[replica]
        self.gone.append(replica)


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedRedis]:
    async with EmbeddedRedis() as running:
        yield running


@pytest.fixture
async def redis(server: EmbeddedRedis) -> AsyncIterator[Redis]:
    client = connect(server.url)
    yield client
    await client.aclose()


@asynccontextmanager
async def watching(url: str, view: View, resync_s: float = 1.5) -> AsyncIterator[MeshWatcher]:
    async with MeshWatcher(url, MESH, view.on_state, view.on_gone, resync_s=resync_s) as watcher:
        yield watcher


@asynccontextmanager
async def synced_view(url: str) -> AsyncIterator[View]:
    view = View()
    async with watching(url, view, resync_s=60) as watcher:
        await asyncio.wait_for(watcher.synced.wait(), 5)
        yield view


async def put(redis: Redis, state: pb.ReplicaState) -> None:
    key = replica_key(MESH, state.group, state.replica)
    await redis.set(key, state.SerializeToString(), px=state.lease_ms)
    await redis.publish(channel_name(MESH), state.SerializeToString())


async def test_a_replica_appears_and_vanishes_within_a_second(
    server: EmbeddedRedis, redis: Redis
) -> None:
    async with synced_view(server.url) as view:
        async with ReplicaPublisher(server.url, MESH, record) as publisher:
            assert await until(lambda: "r0" in view.states) < 1
            state = view.states["r0"]
            assert (state.address, state.lease_ms) == ("127.0.0.1:5000", 1000)
            await until(lambda: publisher.connected)  # the message may overtake Redis's reply
            assert 0 < await redis.pttl(replica_key(MESH, "g0", "r0")) <= 1000
            await publisher.leave()
            assert await until(lambda: view.gone == ["r0"]) < 1
            assert await redis.exists(replica_key(MESH, "g0", "r0")) == 0
        assert view.history[-1].status == pb.REPLICA_STATUS_DRAINING
        assert [s.sequence for s in view.history] == list(range(1, len(view.history) + 1))


async def test_leaving_the_block_leaves_the_mesh(server: EmbeddedRedis) -> None:
    async with synced_view(server.url) as view:
        async with ReplicaPublisher(server.url, MESH, record):
            await until(lambda: "r0" in view.states)
        await until(lambda: view.gone == ["r0"])


async def test_who_was_there_before_the_watcher_is_found_by_the_full_read(
    server: EmbeddedRedis, redis: Redis
) -> None:
    for index in range(40):
        await put(redis, record(f"r{index}", lease_ms=60_000))
    async with synced_view(server.url) as view:
        assert set(view.states) == {f"r{index}" for index in range(40)}


async def test_an_announcement_does_not_wait_for_the_next_heartbeat(server: EmbeddedRedis) -> None:
    status = pb.REPLICA_STATUS_READY
    async with (
        synced_view(server.url) as view,
        ReplicaPublisher(
            server.url, MESH, lambda: record(status=status), interval_s=60, lease_s=120
        ) as publisher,
    ):
        await until(lambda: "r0" in view.states)
        status = pb.REPLICA_STATUS_DRAINING
        publisher.announce()
        draining = pb.REPLICA_STATUS_DRAINING
        assert await until(lambda: view.states["r0"].status == draining) < 1


async def test_a_silent_replica_is_gone_when_its_lease_ends(
    server: EmbeddedRedis, redis: Redis
) -> None:
    async with synced_view(server.url) as view:
        await put(redis, record(lease_ms=300))
        await until(lambda: "r0" in view.states)
        assert 0.2 < await until(lambda: view.gone == ["r0"]) < 1


async def test_a_full_read_keeps_a_replica_whose_messages_are_lost(
    server: EmbeddedRedis, redis: Redis
) -> None:
    async with synced_view(server.url) as view:
        await put(redis, record(lease_ms=300))
        await until(lambda: "r0" in view.states)
        key = replica_key(MESH, "g0", "r0")
        await redis.set(key, record(lease_ms=300, sequence=2).SerializeToString())
        await until(lambda: view.states["r0"].sequence == 2)
        await redis.delete(key)
        await until(lambda: view.gone == ["r0"])


async def test_old_news_is_ignored_and_a_new_life_is_not(
    server: EmbeddedRedis, redis: Redis
) -> None:
    async with synced_view(server.url) as view:
        await put(redis, record(incarnation=2, sequence=5))
        await put(redis, record(incarnation=2, sequence=4, address="old:1"))
        await put(redis, record(incarnation=1, sequence=9, address="old:1"))
        await redis.publish(
            channel_name(MESH), record(incarnation=1, sequence=10, lease_ms=0).SerializeToString()
        )
        await put(redis, record(incarnation=3, sequence=1, address="new:1"))
        await until(lambda: "r0" in view.states and view.states["r0"].address == "new:1")
        assert [state.address for state in view.history] == ["127.0.0.1:5000", "new:1"]
        assert not view.gone


async def test_both_sides_survive_a_restart_of_redis(caplog: pytest.LogCaptureFixture) -> None:
    view = View()
    async with EmbeddedRedis() as first:
        port, url = first.port, first.url
        async with (
            watching(url, view) as watcher,
            ReplicaPublisher(url, MESH, record) as publisher,
        ):
            await until(lambda: "r0" in view.states)
            os.kill(first.pid, signal.SIGKILL)
            await until(lambda: not watcher.connected and not publisher.connected)
            await until(lambda: watcher.redis_age_s > 1.2)  # longer than the lease
            assert not view.gone
            async with EmbeddedRedis(port=port):
                back = len(view.history)
                assert await until(lambda: len(view.history) > back + 2) < 3
                await until(lambda: watcher.connected and publisher.connected)
                assert not view.gone
                assert watcher.redis_age_s < 1
                away = [r.message for r in caplog.records if "Redis is away" in r.message]
                assert len(away) == 2, "each side says an outage once"


async def test_a_redis_that_hangs_is_an_outage_and_not_a_departure(server: EmbeddedRedis) -> None:
    view = View()
    async with (
        watching(server.url, view, resync_s=0.2) as watcher,
        ReplicaPublisher(server.url, MESH, record) as publisher,
    ):
        await until(lambda: "r0" in view.states)
        os.kill(server.pid, signal.SIGSTOP)
        await until(lambda: not watcher.connected and not publisher.connected)
        os.kill(server.pid, signal.SIGCONT)
        await until(lambda: watcher.connected and publisher.connected)
        assert not view.gone


async def test_a_replica_lost_during_an_outage_is_gone_after_it() -> None:
    view = View()
    async with EmbeddedRedis() as first, watching(first.url, view) as watcher:
        redis = connect(first.url)
        await put(redis, record(lease_ms=300))
        await redis.aclose()
        await until(lambda: "r0" in view.states)
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: not watcher.connected)
        async with EmbeddedRedis(port=first.port):
            await until(lambda: view.gone == ["r0"])


async def test_a_replica_starts_and_stops_without_redis(caplog: pytest.LogCaptureFixture) -> None:
    async with ReplicaPublisher("redis://127.0.0.1:9/0", MESH, record) as publisher:
        await until(lambda: "Redis is away" in caplog.text)
        assert not publisher.connected
    assert "the lease ends by itself" in caplog.text


async def test_garbage_is_counted_warned_of_once_and_skipped(
    server: EmbeddedRedis, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.set(replica_key(MESH, "g0", "bytes"), b"\xff\xfe not protobuf")
    await redis.set(replica_key(MESH, "g0", "liar"), record("r9").SerializeToString())
    await redis.hset(replica_key(MESH, "g0", "hash"), "field", "value")
    await put(redis, record("good", lease_ms=60_000))
    view = View()
    async with watching(server.url, view, resync_s=0.05) as watcher:
        await asyncio.wait_for(watcher.synced.wait(), 5)
        await redis.publish(channel_name(MESH), b"\xff\xfe")
        await until(lambda: watcher.num_garbage > 6)
        await put(redis, record("later", lease_ms=60_000))
        await until(lambda: "later" in view.states)
    assert view.states.keys() == {"good", "later"}
    skipped = [r.getMessage() for r in caplog.records if "skipped the record" in r.getMessage()]
    sources = ("channel", replica_key(MESH, "g0", "bytes"), replica_key(MESH, "g0", "liar"))
    for source in sources:
        assert len([line for line in skipped if f"record at {source}: " in line]) == 1
    assert len(skipped) == len(sources)


async def test_a_failing_callback_costs_only_itself(
    server: EmbeddedRedis, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    seen = []

    def on_state(state: pb.ReplicaState) -> None:
        seen.append(state.replica)
        raise KeyError("the owner's bug")

    async with MeshWatcher(server.url, MESH, on_state, seen.append) as watcher:
        await asyncio.wait_for(watcher.synced.wait(), 5)
        await put(redis, record("a"))
        await put(redis, record("b"))
        await until(lambda: seen == ["a", "b"])
        assert watcher.connected
    assert "the owner's bug" in caplog.text


async def test_a_state_that_cannot_be_read_costs_one_heartbeat(
    server: EmbeddedRedis, caplog: pytest.LogCaptureFixture
) -> None:
    broken = False

    def build() -> pb.ReplicaState:
        if broken:
            raise OSError("GPU is lost")
        return record()

    async with (
        synced_view(server.url) as view,
        ReplicaPublisher(server.url, MESH, build, interval_s=0.02),
    ):
        await until(lambda: "r0" in view.states)
        broken = True
        await until(lambda: "GPU is lost" in caplog.text)
        broken, before = False, len(view.history)
        await until(lambda: len(view.history) > before)


async def test_a_replica_no_router_would_accept_fails_at_its_own_door() -> None:
    publisher = ReplicaPublisher("redis://127.0.0.1:9/0", MESH, lambda: record(address=""))
    with pytest.raises(MalformedMessage, match="address: expected host:port, got ''"):
        await publisher.__aenter__()


@pytest.mark.parametrize("build", [ReplicaPublisher, MeshWatcher])
async def test_wrong_settings_name_their_field(build: Callable[..., object]) -> None:
    callbacks = [record] if build is ReplicaPublisher else [print, print]
    with pytest.raises(ConfigError, match="redis_url"):
        build("http://localhost", MESH, *callbacks)
    with pytest.raises(ConfigError, match=r"mesh: .*'a\*b'"):
        build("redis://localhost", "a*b", *callbacks)
