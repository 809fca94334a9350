"""The replica's side of the live state: heartbeats with a lease, and a goodbye."""

import asyncio
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from redis.exceptions import RedisError

from expertmesh.runtime.security.redis_secrets import RedisSecrets
from expertmesh.runtime.state.link import Clock, RedisLink, connect, jittered
from expertmesh.runtime.state.record import (
    channel_name,
    check_mesh_name,
    check_record,
    replica_key,
)
from expertmesh.v1 import control_pb2 as pb

_log = logging.getLogger(__name__)

_MIN_LEASE_S = 1.0


class ReplicaPublisher:
    """Heartbeats of one replica while `async with` lasts; leaving the block leaves the mesh.

    Args:
        redis_url: where the mesh keeps its state.
        mesh: name of the mesh, the key space.
        build_state: the replica as it is now; `incarnation`, `sequence` and `lease_ms` are filled
            in here. Runs on the event loop, so it must not block. If it raises, that heartbeat is
            skipped and the error logged.
        interval_s: mean time between heartbeats.
        lease_s: time after which a silent replica does not exist; 3 intervals, at least 1 s.
        secrets: how to log in to Redis.
        incarnation: tells two lives of one replica id apart; default the wall clock in us.
    """

    def __init__(
        self,
        redis_url: str,
        mesh: str,
        build_state: Callable[[], pb.ReplicaState],
        *,
        interval_s: float = 0.2,
        lease_s: float | None = None,
        incarnation: int | None = None,
        secrets: RedisSecrets | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._mesh = check_mesh_name(mesh)
        self._redis = connect(redis_url, secrets)
        self._build_state = build_state
        self._interval_s = interval_s
        self._lease_ms = round(1000 * max(lease_s or 3 * interval_s, _MIN_LEASE_S))
        self._incarnation = incarnation or time.time_ns() // 1000
        self._sequence = 0
        self._state = pb.ReplicaState()
        self._announced = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._leaving = False
        self._link = RedisLink("heartbeat", clock)

    @property
    def connected(self) -> bool:
        """Whether Redis took the newest heartbeat."""
        return self._link.connected

    async def __aenter__(self) -> Self:
        self._read_state()
        check_record(self._state)  # fail here rather than in the log of every router
        self._task = asyncio.create_task(self._run(), name="replica-heartbeat")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.leave()
        await self._redis.aclose()

    def announce(self) -> None:
        """Publish at once: something changed that routers should know now."""
        self._announced.set()

    async def leave(self) -> None:
        """Take the replica out of every router's view at once and fall silent. Never raises."""
        if self._task is None or self._leaving:
            return
        self._leaving = True
        self._announced.set()
        await (
            self._task
        )  # not cancelled: a heartbeat still on its way would arrive after the tombstone
        state, channel = self._state, channel_name(self._mesh)
        state.status = pb.REPLICA_STATUS_DRAINING
        draining = self._next_payload()
        state.lease_ms = 0
        tombstone = self._next_payload()
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.publish(channel, draining)
                pipe.delete(replica_key(self._mesh, state.group, state.replica))
                pipe.publish(channel, tombstone)
                await pipe.execute()
        except (RedisError, OSError) as error:
            _log.warning("heartbeat: no goodbye (%s); the lease ends by itself", error)

    def _read_state(self) -> None:
        state = pb.ReplicaState()
        state.CopyFrom(self._build_state())
        state.incarnation, state.lease_ms = self._incarnation, self._lease_ms
        self._state = state

    def _next_payload(self) -> bytes:
        self._sequence += 1
        self._state.sequence = self._sequence
        return self._state.SerializeToString()

    async def _run(self) -> None:
        while not self._leaving:
            self._announced.clear()
            wait_s = await self._beat()
            try:
                await asyncio.wait_for(self._announced.wait(), wait_s)
            except TimeoutError:
                continue

    async def _beat(self) -> float:
        """Publish once; the time until the next heartbeat, in seconds."""
        try:
            self._read_state()
        except Exception:
            _log.exception("heartbeat: skipped, the replica's state could not be read")
            return jittered(self._interval_s)
        key = replica_key(self._mesh, self._state.group, self._state.replica)
        payload = self._next_payload()
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.set(key, payload, px=self._lease_ms)
                pipe.publish(channel_name(self._mesh), payload)
                await pipe.execute()
        except (RedisError, OSError) as error:
            return self._link.failed(error)
        self._link.answered()
        return jittered(self._interval_s)
