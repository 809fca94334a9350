"""One holder at a time, of something in Redis, with an epoch that grows with every change of hands.

    expertmesh:{mesh}:controller         the holder's token, expires with its lease
    expertmesh:{mesh}:controller:epoch   the newest epoch
    expertmesh:{mesh}:plan, ...:move     what the holder writes, see `services/controller/`

A holder that cannot renew in time stops believing that it holds before Redis lets another one in.
What it still has under way then is fenced: who has seen a newer epoch refuses the older one.
"""

import logging
import secrets
import time
from typing import Any

from redis.exceptions import RedisError

from expertmesh.runtime.security.redis_secrets import RedisSecrets
from expertmesh.runtime.state.link import Clock, RedisLink, connect
from expertmesh.runtime.state.record import check_mesh_name

_log = logging.getLogger(__name__)

_BELIEF_FRAC = 0.8
"""Share of the lease after which a holder that has not renewed stops: clocks run unevenly."""
_TAKE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return redis.call('INCR', KEYS[2])
"""
_KEEP = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""
_RAISE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
local epoch = math.max(tonumber(redis.call('GET', KEYS[2]) or '0'), tonumber(ARGV[2])) + 1
redis.call('SET', KEYS[2], string.format('%.0f', epoch))
return epoch
"""
_WRITE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[3] == '' then redis.call('DEL', ARGV[2]) else redis.call('SET', ARGV[2], ARGV[3]) end
return 1
"""
_LEAVE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""


def lease_key(mesh: str) -> str:
    """The Redis key of who controls a mesh."""
    return f"expertmesh:{mesh}:controller"


class Lease:
    """The controller's. Nothing here raises when Redis is away: then nobody holds for long.

    Args:
        lease_s: time without renewal after which another one may take it.
        redis_secrets: where the password of Redis is, and certificates.
    """

    def __init__(
        self,
        redis_url: str,
        mesh: str,
        lease_s: float,
        clock: Clock = time.monotonic,
        redis_secrets: RedisSecrets | None = None,
    ) -> None:
        key = lease_key(check_mesh_name(mesh))
        self._keys = [key, f"{key}:epoch"]
        self._redis = connect(redis_url, redis_secrets)
        self._lease_s, self._clock = lease_s, clock
        self._token = secrets.token_hex(16)
        self._until_s = -1.0
        self._link = RedisLink("controller's lease", clock)
        self._epoch = 0

    @property
    def epoch(self) -> int:
        """Of the holder; 0 if this is not it, or may not be it any more."""
        return self._epoch if self._clock() < self._until_s else 0

    async def refresh(self) -> int:
        """Take the lease if nobody has it, renew it if it is ours; the epoch, or 0."""
        began_s = self._clock()  # the lease begins at the latest when Redis answers
        if self._epoch:
            kept = await self._run(_KEEP, self._lease_ms)
            if kept is None:  # Redis is away: we hold as long as we believe, and try again
                return self.epoch
            if not kept:
                _log.warning("the controller's lease of epoch %d is lost", self._epoch)
                self._epoch = 0
        if not self._epoch:
            self._epoch = await self._run(_TAKE, self._lease_ms) or 0
            if self._epoch:
                _log.info("this controller holds the lease, epoch %d", self._epoch)
        self._until_s = began_s + _BELIEF_FRAC * self._lease_s
        return self.epoch

    async def write(self, key: str, value: bytes) -> bool:
        """Set another key of the mesh, or delete it if there is no value, as the holder only.

        Returns:
            Whether that was done.
        """
        return bool(self.epoch and await self._run(_WRITE, self._key(key), value))

    async def read(self, key: str) -> bytes:
        """Another key of the mesh; no bytes if it is not there, or Redis is away."""
        try:
            found: Any = await self._redis.get(self._key(key))
        except (RedisError, OSError) as error:
            self._link.failed(error)
            return b""
        return bytes(found or b"")

    async def outbid(self, seen: int) -> int:
        """Raise the epoch above one that somebody has seen: Redis may have lost its memory.

        Returns:
            The new epoch, or 0 if the lease is not ours.
        """
        if self.epoch:
            self._epoch = await self._run(_RAISE, seen) or 0
        return self.epoch

    async def leave(self) -> None:
        """Give it back, if it is ours."""
        if self._epoch:
            await self._run(_LEAVE)
        self._epoch = 0
        await self._redis.aclose()

    async def abandon(self) -> None:
        """Close the connection without giving it back."""
        await self._redis.aclose()

    @property
    def _lease_ms(self) -> int:
        return round(self._lease_s * 1e3)

    def _key(self, name: str) -> str:
        return f"{self._keys[0].removesuffix('controller')}{name}"

    async def _run(self, script: str, *args: int | str | bytes) -> int | None:
        """What the script returns; None if Redis is away."""
        try:
            found = await self._redis.eval(script, len(self._keys), *self._keys, self._token, *args)
        except (RedisError, OSError) as error:
            self._link.failed(error)
            return None
        self._link.answered()
        return int(found)
