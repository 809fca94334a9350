"""Decisions on scaling, and numbers of replicas set by hand, as Redis keeps them.

    expertmesh:{mesh}:scaling:{group}    a serialised GroupScaling, written anew all the time
    expertmesh:{mesh}:replicas:{group}   replicas set by hand, in decimal, expires with the order

Expiry is left to Redis: clocks of different hosts are not compared.
"""

from types import TracebackType
from typing import Self

from google.protobuf.message import DecodeError
from redis.exceptions import RedisError

from expertmesh.runtime.errors import InvalidInput, Unavailable
from expertmesh.runtime.security.redis_secrets import RedisSecrets
from expertmesh.runtime.state.link import connect
from expertmesh.runtime.state.record import check_mesh_name
from expertmesh.v1 import control_pb2 as pb

DECISION_LIFE_MS = 10_000
"""A decision not written anew for so long is forgotten: nobody decides any more."""
LEAST_FOR_MS, MOST_FOR_MS = 1000, 7 * 24 * 3600 * 1000


def decision_key(mesh: str, group: str) -> str:
    """The Redis key of the newest decision on a group."""
    return f"expertmesh:{mesh}:scaling:{group}"


def override_key(mesh: str, group: str) -> str:
    """The Redis key of the number of replicas set by hand."""
    return f"expertmesh:{mesh}:replicas:{group}"


class ScalingBoard:
    """What people see and do: reads decisions, sets and takes back numbers of replicas."""

    def __init__(self, redis_url: str, mesh: str, secrets: RedisSecrets | None = None) -> None:
        self._mesh = check_mesh_name(mesh)
        self._redis = connect(redis_url, secrets)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._redis.aclose()

    async def read(self) -> list[pb.GroupScaling]:
        """The newest decision on each group that is scaled, by group.

        Raises:
            Unavailable: Redis does not answer.
        """
        try:
            return await self._read()
        except (RedisError, OSError) as error:
            raise _away(error) from error

    async def _read(self) -> list[pb.GroupScaling]:
        keys: list[bytes] = [
            key async for key in self._redis.scan_iter(decision_key(self._mesh, "*"))
        ]
        async with self._redis.pipeline(transaction=False) as pipe:
            for key in sorted(keys):
                pipe.get(key)
                pipe.pttl(key)
            answers = await pipe.execute()
        decisions = []
        for payload, left_ms in zip(answers[::2], answers[1::2], strict=True):
            if payload is not None and (decision := _parsed(payload)):
                decision.age_ms = max(0, DECISION_LIFE_MS - left_ms)
                decisions.append(decision)
        return decisions

    async def set_replicas(self, group: str, replicas: int, for_ms: int) -> None:
        """Have a group keep so many replicas for so long.

        Raises:
            InvalidInput: no group that is scaled, or a number outside of its bounds.
            Unavailable: Redis does not answer.
        """
        decision = await self._group(group)
        if decision.mode != pb.SCALING_MODE_ON:
            hint = "Its replicas are what experts.replicas says; set experts.scaling.mode to on."
            raise InvalidInput.of(
                "group",
                expected="one that is scaled",
                got=f"{group}, which is advised only",
                hint=hint,
            )
        if not decision.min_replicas <= replicas <= decision.max_replicas:
            expected = f"{decision.min_replicas} to {decision.max_replicas}, the bounds of {group}"
            raise InvalidInput.of("replicas", expected=expected, got=replicas)
        if not LEAST_FOR_MS <= for_ms <= MOST_FOR_MS:
            raise InvalidInput.of("for_ms", expected=f"{LEAST_FOR_MS} to {MOST_FOR_MS}", got=for_ms)
        try:
            await self._redis.set(override_key(self._mesh, group), str(replicas), px=for_ms)
        except (RedisError, OSError) as error:
            raise _away(error) from error

    async def release(self, group: str) -> bool:
        """Take back what was set by hand; whether something was.

        Raises:
            InvalidInput: no group that is scaled.
            Unavailable: Redis does not answer.
        """
        await self._group(group)
        try:
            return bool(await self._redis.delete(override_key(self._mesh, group)))
        except (RedisError, OSError) as error:
            raise _away(error) from error

    async def _group(self, group: str) -> pb.GroupScaling:
        decisions = {decision.group: decision for decision in await self.read()}
        if group not in decisions:
            known = ", ".join(sorted(decisions)) or "none, as experts.scaling.mode is off"
            raise InvalidInput.of(
                "group", expected=f"one that is scaled ({known})", got=repr(group)
            )
        return decisions[group]


def _parsed(payload: bytes) -> pb.GroupScaling | None:
    """None if it is garbage: whoever reaches Redis can write there."""
    try:
        return pb.GroupScaling.FromString(payload)
    except DecodeError:
        return None


def _away(error: Exception) -> Unavailable:
    return Unavailable(f"redis does not answer ({error}); scaling goes on without it")
