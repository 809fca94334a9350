"""A Redis that may be away: calls fail at once, outages are logged once, tries back off."""

import logging
import math
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

import redis
import redis.retry
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider

from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.security.redis_secrets import (
    RedisSecrets,
    split_user,
    without_password,
)

_log = logging.getLogger(__name__)

_TIMEOUT_S = 1.0
_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 0.5
_JITTER_FRAC = 0.2

Clock = Callable[[], float]
T = TypeVar("T")


class Login(CredentialProvider):
    """Asked by redis-py at each new connection, so that a new password needs no restart."""

    def __init__(self, username: str | None, secrets: RedisSecrets) -> None:
        self._username = username
        self._secrets = secrets

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """(password,) or (user, password)."""
        password = self._secrets.read_password() or ""
        return (self._username, password) if self._username else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """The same: a small file."""
        return self.get_credentials()


def connect(redis_url: str, secrets: RedisSecrets | None = None) -> Redis:
    """A client that fails at once instead of retrying inside: its user owns the retries.

    Args:
        secrets: where the password is, and certificates.

    Raises:
        ConfigError: not a Redis URL, or what `secrets` names is not there.
    """
    return _made(Redis.from_url, redis_url, secrets, retry=Retry(NoBackoff(), 0))


def connect_blocking(
    redis_url: str, secrets: RedisSecrets | None = None
) -> "redis.Redis":  # the class of the same name that is not asyncio's
    """The same for a thread."""
    return _made(redis.Redis.from_url, redis_url, secrets, retry=redis.retry.Retry(NoBackoff(), 0))


def _made(make: Callable[..., T], redis_url: str, secrets: RedisSecrets | None, retry: Any) -> T:
    secrets = secrets or RedisSecrets()
    options = secrets.tls_options(redis_url)
    if secrets.read_password() is not None:
        redis_url, username = split_user(without_password(redis_url))
        options["credential_provider"] = Login(username, secrets)
    try:
        return make(
            redis_url,
            **options,
            protocol=2,  # RESP3 gains us nothing and costs a handshake
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            socket_keepalive=True,
            retry=retry,
        )
    except ValueError:  # its text may repeat the URL
        raise ConfigError.of(
            "redis_url", expected="redis://host:port/db, rediss:// or unix://", got="something else"
        ) from None


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
