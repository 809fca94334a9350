"""The controller's lease: one holder, a growing epoch, and nothing written by who has lost it."""

import asyncio

from tests.waiting import until

from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.runtime.state import Lease

LEASE_S = 1.0


async def test_one_holds_and_the_next_has_a_greater_epoch(redis_url: str) -> None:
    first, second = (Lease(redis_url, "lease-1", LEASE_S) for _ in range(2))
    assert await first.refresh() == 1
    assert await second.refresh() == 0
    assert await first.refresh() == 1, "renewed"
    await first.leave()
    assert first.epoch == 0
    assert await second.refresh() == 2
    await second.leave()


async def test_a_silent_holder_is_succeeded_and_knows_before(redis_url: str) -> None:
    silent, next_one = (Lease(redis_url, "lease-2", LEASE_S) for _ in range(2))
    assert await silent.refresh() == 1
    await until(lambda: silent.epoch == 0)
    async with asyncio.timeout(5):
        while not await next_one.refresh():  # noqa: ASYNC110  # Redis lets it in, no event
            await asyncio.sleep(0.02)
    assert next_one.epoch == 2
    assert not await silent.write("plan", b"old")
    assert await next_one.write("plan", b"new")
    assert await silent.refresh() == 0
    assert await silent.read("plan") == b"new"
    assert await next_one.write("plan", b"")
    assert await silent.read("plan") == b""
    await silent.leave()
    assert await next_one.refresh() == 2, "who has lost it gives nothing back"
    await next_one.leave()


async def test_what_redis_has_forgotten_is_outbid(redis_url: str) -> None:
    lease, other = (Lease(redis_url, "lease-3", LEASE_S) for _ in range(2))
    assert await lease.outbid(41) == 0, "not the holder"
    assert await lease.refresh() == 1
    assert await lease.outbid(41) == 42
    assert lease.epoch == 42
    await lease.leave()
    assert await other.refresh() == 43
    await other.leave()


async def test_without_redis_nobody_holds_for_long() -> None:
    async with EmbeddedRedis() as server:
        lease = Lease(server.url, "lease-4", LEASE_S)
        assert await lease.refresh() == 1
    assert await lease.refresh() in (0, 1), "for a while it may believe"
    await until(lambda: lease.epoch == 0)
    assert await lease.refresh() == 0
    assert await lease.read("plan") == b""
    assert not await lease.write("plan", b"x")
    await lease.leave()
