"""A Redis that may be away: calls fail at once, outages are logged once, tries back off."""

import logging
import math
import random
import time
from collections.abc import Callable

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from expertmesh.runtime.errors import ConfigError

_log = logging.getLogger(__name__)

_TIMEOUT_S = 1.0
_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 0.5
_JITTER_FRAC = 0.2

Clock = Callable[[], float]


def connect(redis_url: str) -> Redis:
    """A client that fails at once instead of retrying inside: its user owns the retries.

    Raises:
        ConfigError: not a Redis URL.
    """
    try:
        return Redis.from_url(
            redis_url,
            protocol=2,  # RESP3 gains us nothing and costs a handshake
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as error:
        raise ConfigError.of(
            "redis_url", expected="redis://host:port/db, rediss:// or unix://", got=str(error)
        ) from error


def jittered(period_s: float) -> float:
    """The period give or take a fifth, so that processes started together do not beat together."""
    return period_s * random.uniform(1 - _JITTER_FRAC, 1 + _JITTER_FRAC)


class RedisLink:
    """Whether Redis answers, since when, and how long to wait before the next try.

    Args:
        who: names the user of the connection in the log.
    """

    def __init__(self, who: str, clock: Clock = time.monotonic) -> None:
        self._who = who
        self._clock = clock
        self._answered_s = clock()
        self._backoff_s = _FIRST_BACKOFF_S
        self._in_outage = False
        self.connected = False
        self.returned_s = -math.inf
        """When Redis last came back from an outage, by the clock."""

    @property
    def age_s(self) -> float:
        """Time since Redis last answered, or since the start if it never did."""
        return self._clock() - self._answered_s

    def answered(self) -> None:
        """Note that Redis answered."""
        now_s = self._clock()
        if self._in_outage:
            _log.info("%s: Redis is back after %.1f s", self._who, now_s - self._answered_s)
            self.returned_s = now_s
        self._answered_s = now_s
        self.connected, self._in_outage, self._backoff_s = True, False, _FIRST_BACKOFF_S

    def failed(self, error: BaseException) -> float:
        """Note that Redis did not answer; how long to wait before the next try, in seconds."""
        if not self._in_outage:
            _log.warning("%s: Redis is away (%s); trying until it is back", self._who, error)
        self.connected, self._in_outage = False, True
        wait_s, self._backoff_s = self._backoff_s, min(2 * self._backoff_s, _MAX_BACKOFF_S)
        return jittered(wait_s)
