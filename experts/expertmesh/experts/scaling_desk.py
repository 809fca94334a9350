"""The I/O of scaling: a thread beside Serve's control loop that tells decisions and takes orders.

The loop must not wait for anything. So it leaves its newest decision here and finds the newest
order here, while the thread talks to Redis and to the collector of telemetry.
"""

import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from redis import Redis

from expertmesh.experts.scaling import Override
from expertmesh.runtime.metrics import Metrics
from expertmesh.runtime.security.redis_secrets import RedisSecrets
from expertmesh.runtime.state.link import connect_blocking
from expertmesh.runtime.state.scaling import DECISION_LIFE_MS, decision_key, override_key
from expertmesh.runtime.telemetry import configure
from expertmesh.v1 import control_pb2 as pb

_log = logging.getLogger(__name__)

_PERIOD_S = 0.25


@dataclass
class _Mail:
    """What loop and thread leave for each other; each attribute has one writer."""

    decision: pb.GroupScaling | None = None
    override: Override | None = None
    more_by_gpus: int | None = None
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class _Addresses:
    redis_url: str
    mesh: str
    group: str
    otlp_endpoint: str | None
    num_gpus: float


class ScalingDesk:
    """One group's. The thread ends when nobody holds the desk any more.

    Args:
        num_gpus: what a replica reserves.
        redis_secrets: fields of `RedisSecrets`.
        clock: of overrides.
    """

    def __init__(
        self,
        redis_url: str,
        mesh: str,
        group: str,
        otlp_endpoint: str | None = None,
        num_gpus: float = 0.0,
        redis_secrets: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mail = _Mail()
        addresses = _Addresses(redis_url, mesh, group, otlp_endpoint, num_gpus)
        redis = connect_blocking(redis_url, RedisSecrets.model_validate(redis_secrets or {}))
        weakref.finalize(self, self._mail.stop.set)
        threading.Thread(
            target=_run, args=(redis, addresses, self._mail, clock), name="scaling", daemon=True
        ).start()

    @property
    def override(self) -> Override | None:
        """The number set by hand, as last read; it may have expired."""
        return self._mail.override

    @property
    def more_by_gpus(self) -> int | None:
        """Replicas that the GPUs which Ray has free would do for; None where replicas need none."""
        return self._mail.more_by_gpus

    def tell(self, decision: pb.GroupScaling) -> None:
        """Have the decision told; only the newest is."""
        self._mail.decision = decision


def _run(redis: Redis, to: _Addresses, mail: _Mail, clock: Callable[[], float]) -> None:
    telemetry = configure("scaling", to.otlp_endpoint, instance=to.group)
    told, away = _Told(telemetry.metrics, to.group), False
    written: pb.GroupScaling | None = None
    while not mail.stop.wait(_PERIOD_S):
        newest = mail.decision
        try:
            if to.num_gpus:
                mail.more_by_gpus = int(_free_gpus() / to.num_gpus)
            # one that is not renewed shall be forgotten: nobody decides any more
            fresh = newest if newest is not written else None
            mail.override = _exchange(redis, to, fresh, clock)
            written, away = newest, False
        except Exception as error:  # the thread must go on, whatever is away
            if not away:
                _log.warning("scaling of %s: nothing is told or heard: %r", to.group, error)
            away = True
        if newest:
            told.update(newest)
    redis.close()
    telemetry.shutdown()


def _free_gpus() -> float:
    """Those of all nodes together: two halves of two GPUs count as one."""
    import ray

    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return free.get("GPU", 0.0)


def _exchange(
    redis: Redis, to: _Addresses, decision: pb.GroupScaling | None, clock: Callable[[], float]
) -> Override | None:
    """Write the decision, read the order."""
    key = override_key(to.mesh, to.group)
    with redis.pipeline(transaction=False) as pipe:
        pipe.get(key)
        pipe.pttl(key)
        if decision:
            payload = decision.SerializeToString()
            pipe.set(decision_key(to.mesh, to.group), payload, px=DECISION_LIFE_MS)
        replicas, left_ms, *_ = pipe.execute()
    if replicas is None or left_ms <= 0 or not replicas.isdigit():
        return None
    return Override(int(replicas), clock() + left_ms / 1000)


class _Told:
    """Keeps the metrics at the newest decision."""

    def __init__(self, metrics: Metrics, group: str) -> None:
        self._metrics, self._group = metrics, group
        self._wanted = self._ready = 0

    def update(self, decision: pb.GroupScaling) -> None:
        """Levels take differences."""
        if decision.wanted != self._wanted:
            self._metrics.scaling_changes.add(1, self._group, decision.reason)
        self._metrics.wanted_replicas.add(decision.wanted - self._wanted, self._group)
        self._metrics.ready_replicas.add(decision.ready - self._ready, self._group)
        self._wanted, self._ready = decision.wanted, decision.ready
