"""The router's side of the live state: who is there, by messages, full reads and leases."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from expertmesh.runtime.errors import MalformedMessage
from expertmesh.runtime.security.redis_secrets import RedisSecrets
from expertmesh.runtime.state.link import Clock, RedisLink, connect, jittered
from expertmesh.runtime.state.record import (
    channel_name,
    check_mesh_name,
    is_tombstone,
    parse_record,
    replica_key,
    replica_pattern,
)
from expertmesh.runtime.tasks import end
from expertmesh.v1 import control_pb2 as pb

_log = logging.getLogger(__name__)

# Redis keeps nothing on disk: after a restart it is empty, and replicas need a moment to come back.
_RETURN_GRACE_S = 1.0
_RECHECK_S = 0.05
_SCAN_COUNT = 500
_MAX_WARNED_SOURCES = 1000

T = TypeVar("T")


@dataclass(frozen=True)
class _Heard:
    """The newest record of a replica and when it came, by the watcher's clock."""

    state: pb.ReplicaState
    at_s: float

    @property
    def order(self) -> tuple[int, int]:
        return self.state.incarnation, self.state.sequence

    @property
    def lease_s(self) -> float:
        return self.state.lease_ms / 1000


class MeshWatcher:
    """Keeps its owner informed of every replica of a mesh for as long as `async with` lasts.

    While Redis is away nobody is declared gone; `connected` and `redis_age_s` tell.

    Args:
        redis_url: where the mesh keeps its state.
        mesh: name of the mesh, the key space.
        on_state: called on the event loop with each new record of a replica; must not block.
        on_gone: called with the id of a replica that left or whose lease ended.
        secrets: how to log in to Redis.
        resync_s: mean time between full reads, which make up for lost messages.
    """

    def __init__(
        self,
        redis_url: str,
        mesh: str,
        on_state: Callable[[pb.ReplicaState], None],
        on_gone: Callable[[str], None],
        *,
        resync_s: float = 1.5,
        secrets: RedisSecrets | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._mesh = check_mesh_name(mesh)
        self._redis = connect(redis_url, secrets)
        self._on_state = on_state
        self._on_gone = on_gone
        self._resync_s = resync_s
        self._clock = clock
        self._heard: dict[str, _Heard] = {}
        self._warned: set[str] = set()
        self._link = RedisLink("mesh watcher", clock)
        self._task: asyncio.Task[None] | None = None
        self.synced = asyncio.Event()
        """Set once the first full read is done."""
        self.num_garbage = 0
        """Records skipped because no replica of ours can have written them."""

    @property
    def connected(self) -> bool:
        """Whether Redis answers now."""
        return self._link.connected

    @property
    def redis_age_s(self) -> float:
        """Time since Redis last answered, or since the start if it never did."""
        return self._link.age_s

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="mesh-watcher")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._task is not None
        await end(self._task)
        await self._redis.aclose()

    async def _run(self) -> None:
        while True:
            try:
                await self._watch()
            except (RedisError, OSError) as error:
                wait_s = self._link.failed(error)
            except Exception as error:
                _log.exception("mesh watcher: a bug; starting over")
                wait_s = self._link.failed(error)
            await asyncio.sleep(wait_s)

    async def _watch(self) -> None:
        """Subscribe, then read everything, then follow: in this order no change is missed."""
        async with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            await pubsub.subscribe(channel_name(self._mesh))
            while True:
                await self._resync()
                await self._follow(pubsub)

    async def _follow(self, pubsub: PubSub) -> None:
        """Apply messages until the next full read is due, by the clock or because a lease ended."""
        now_s = self._clock()
        until_s, soonest_s = now_s + jittered(self._resync_s), now_s + _RECHECK_S
        while (wait_s := min(until_s, max(self._next_expiry_s(), soonest_s)) - self._clock()) > 0:
            message = await pubsub.get_message(timeout=wait_s)
            if message is not None:
                self._link.answered()
                self._take("channel", message["data"])

    async def _resync(self) -> None:
        """Read every record; forget replicas whose lease ended and whose record is not there."""
        pattern = replica_pattern(self._mesh)
        keys: list[bytes] = [key async for key in self._redis.scan_iter(pattern, _SCAN_COUNT)]
        payloads: list[Any] = await self._redis.mget(keys) if keys else []
        self._link.answered()
        present = set()
        for key, payload in zip(keys, payloads, strict=True):
            if payload is not None:
                present.add(self._take(key.decode(errors="replace"), payload))
        for replica in [replica for replica in self._heard if replica not in present]:
            if self._expiry_s(self._heard[replica]) <= self._clock():
                self._forget(replica)
        self.synced.set()

    def _expiry_s(self, heard: _Heard) -> float:
        return max(heard.at_s, self._link.returned_s + _RETURN_GRACE_S) + heard.lease_s

    def _next_expiry_s(self) -> float:
        return min((self._expiry_s(heard) for heard in self._heard.values()), default=float("inf"))

    def _take(self, source: str, payload: bytes) -> str | None:
        """Apply one record; the id of its replica, or None if it is garbage."""
        try:
            state = parse_record(payload)
            key = replica_key(self._mesh, state.group, state.replica)
            if source not in ("channel", key):
                raise MalformedMessage(f"replica record: expected the one of {source}, got {key}")
        except MalformedMessage as error:
            self._skip(source, error)
            return None
        known = self._heard.get(state.replica)
        if known is not None and (state.incarnation, state.sequence) <= known.order:
            return state.replica
        if is_tombstone(state):
            self._forget(state.replica)
        else:
            self._heard[state.replica] = _Heard(state, self._clock())
            self._tell(self._on_state, state)
        return state.replica

    def _skip(self, source: str, error: MalformedMessage) -> None:
        self.num_garbage += 1
        if source not in self._warned and len(self._warned) < _MAX_WARNED_SOURCES:
            self._warned.add(source)
            _log.warning("mesh watcher: skipped the record at %s: %s", source, error)

    def _forget(self, replica: str) -> None:
        if self._heard.pop(replica, None) is not None:
            self._tell(self._on_gone, replica)

    def _tell(self, callback: Callable[[T], None], news: T) -> None:
        try:
            callback(news)
        except Exception:  # the owner's bug must not cost it the other replicas
            _log.exception("mesh watcher: a callback failed")
