"""Redis with a password and with TLS: a real server, and a proxy that ends TLS before it, as the
Valkey that comes with the package is built without.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
from benchmarks.harness.certificates import Authority, Pair
from chaos.link import Link
from redis.exceptions import AuthenticationError, ConnectionError
from tests.fakes import replica_state as record

from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.runtime.config import load, validate
from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.runtime.security.redis_secrets import RedisSecrets, split_password
from expertmesh.runtime.state import MeshWatcher, ReplicaPublisher
from expertmesh.runtime.state.link import connect
from expertmesh.services.settings import MeshSettings, RedisSettings

PASSWORD = "correct:horse@battery/staple%"  # every character that means something in an URL
PLAIN_PASSWORD = "correct-horse-battery-staple"


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedRedis]:
    async with EmbeddedRedis(password=PASSWORD) as running:
        yield running


def secrets_of(server: EmbeddedRedis, **more: str) -> RedisSecrets:
    return RedisSecrets.model_validate({"password_file": server.password_file} | more)


async def hears_of(url: str, secrets: RedisSecrets) -> str:
    """The replica that a watcher hears of from a publisher."""
    heard: asyncio.Queue[str] = asyncio.Queue()

    async with (
        MeshWatcher(url, "m", lambda s: heard.put_nowait(s.replica), print, secrets=secrets),
        ReplicaPublisher(url, "m", lambda: record(replica="r7"), secrets=secrets),
    ):
        return await asyncio.wait_for(heard.get(), 20)


async def test_heartbeats_with_a_password(server: EmbeddedRedis) -> None:
    assert await hears_of(server.url, secrets_of(server)) == "r7"


async def test_without_the_password_there_is_nothing(server: EmbeddedRedis, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("guess", "utf-8")
    for secrets in (None, RedisSecrets(password_file=str(wrong))):
        async with connect(server.url, secrets) as redis:
            with pytest.raises(AuthenticationError):
                await redis.ping()


async def test_a_new_password_needs_no_restart(server: EmbeddedRedis, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(PASSWORD + "\n", "utf-8")
    async with connect(server.url, RedisSecrets(password_file=str(file))) as redis:
        await redis.config_set("requirepass", PLAIN_PASSWORD)
        file.write_text(PLAIN_PASSWORD, "utf-8")
        await redis.connection_pool.disconnect()
        assert await redis.ping()


async def test_the_password_may_be_in_a_variable(
    server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = RedisSecrets(password_env="OUR_REDIS_PASSWORD")
    with pytest.raises(ConfigError, match="no variable OUR_REDIS_PASSWORD"):
        connect(server.url, secrets)
    monkeypatch.setenv("OUR_REDIS_PASSWORD", PASSWORD)
    async with connect(server.url, secrets) as redis:
        assert await redis.ping()


async def test_a_user_and_a_password_in_the_settings(server: EmbeddedRedis) -> None:
    url = server.url.replace("redis://", "redis://default@")
    settings = RedisSettings.model_validate({"url": url, "password": PASSWORD})
    async with connect(str(settings.url), settings) as redis:
        assert await redis.acl_whoami() == "default"


async def test_ps_shows_no_password(server: EmbeddedRedis) -> None:
    arguments = psutil.Process(server.pid).cmdline()
    assert "server.conf" in arguments[-1] or "valkey" in arguments[0]
    assert PASSWORD not in " ".join(arguments)
    assert server.password_file
    mode = await asyncio.to_thread(lambda: Path(str(server.password_file)).parent.stat().st_mode)
    assert mode & 0o077 == 0


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Authority(tmp_path / "pki").pair("redis", dns=["localhost"])


@pytest.fixture
async def encrypted(server: EmbeddedRedis, pair: Pair) -> AsyncIterator[str]:
    """The URL of the server behind TLS, which asks for a certificate of the same CA."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=pair.ca_file)
    context.load_cert_chain(pair.cert_file, pair.key_file)
    context.verify_mode = ssl.CERT_REQUIRED
    async with Link(f"127.0.0.1:{server.port}", tls=context) as link:
        yield f"rediss://{link.address}/0"


async def test_heartbeats_over_tls(server: EmbeddedRedis, encrypted: str, pair: Pair) -> None:
    files = {"ca_file": pair.ca_file, "cert_file": pair.cert_file, "key_file": pair.key_file}
    assert await hears_of(encrypted, secrets_of(server, **files)) == "r7"


async def test_a_redis_of_another_ca_is_not_ours(
    server: EmbeddedRedis, encrypted: str, pair: Pair, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other")
    mine = {"cert_file": pair.cert_file, "key_file": pair.key_file}
    for secrets in (
        secrets_of(server, ca_file=other.ca_file, **mine),
        secrets_of(server, **mine),  # the system's CAs
        secrets_of(server, ca_file=pair.ca_file),  # no certificate of its own
    ):
        async with connect(encrypted, secrets) as redis:
            with pytest.raises((ConnectionError, OSError)):
                await redis.ping()


async def test_a_redis_of_another_name_is_not_ours(server: EmbeddedRedis, tmp_path: Path) -> None:
    pair = Authority(tmp_path / "pki").pair("redis", dns=["redis.example.com"], ip="127.0.0.9")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.cert_file, pair.key_file)
    secrets = secrets_of(server, ca_file=pair.ca_file)
    async with Link(f"127.0.0.1:{server.port}", tls=context) as link:
        redis = connect(f"rediss://{link.address}/0", secrets)
        with pytest.raises((ConnectionError, OSError), match="match"):
            await redis.ping()
        await redis.aclose()


async def test_certificates_ask_for_an_encrypted_url(server: EmbeddedRedis, pair: Pair) -> None:
    with pytest.raises(ConfigError, match="rediss://"):
        connect(server.url, secrets_of(server, ca_file=pair.ca_file))
    with pytest.raises(ConfigError, match="cannot be read"):
        connect("rediss://h:1/0", RedisSecrets(ca_file="/nowhere"))


SECRET_PLACES = [
    {"redis": {"url": f"redis://:{PLAIN_PASSWORD}@h:1/0"}},
    {"redis": {"url": f"redis://user:{PLAIN_PASSWORD}@h:1/0"}},
    {"redis": {"url": "redis://h:1/0", "password": PLAIN_PASSWORD}},
]


@pytest.mark.parametrize("given", SECRET_PLACES)
def test_settings_never_show_a_password(given: dict[str, dict[str, str]]) -> None:
    settings = validate(MeshSettings, {"model": "m"} | given)
    assert settings.redis.read_password() == PLAIN_PASSWORD
    shown = repr(settings), str(settings), json.dumps(settings.model_dump(mode="json"))
    assert PLAIN_PASSWORD not in "".join(shown)
    with pytest.raises(ConfigError, match="put it into a file"):
        settings.redis.secrets()


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": f"redis://:{PLAIN_PASSWORD}@h:port/0"},
        {"url": f"redis://:p/{PLAIN_PASSWORD}@h:1/0"},
        {"url": f"redis://h:1/0?password={PLAIN_PASSWORD}"},
        {"url": f"redis://:{PLAIN_PASSWORD}@h:1/0", "password": PLAIN_PASSWORD},
        {"password": PLAIN_PASSWORD, "password_file": "f"},
        {"password": [PLAIN_PASSWORD]},
        {"password": PLAIN_PASSWORD, "ca": "misspelt"},
        {"passwort": PLAIN_PASSWORD},
    ],
)
def test_errors_about_redis_never_show_a_password(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as error:
        validate(MeshSettings, {"model": "m", "redis": wrong})
    assert PLAIN_PASSWORD not in str(error.value) + repr(error.value.fields)


def test_a_password_from_a_variable_is_text_whatever_it_looks_like() -> None:
    for text in ("12", "true", "a: b", "%x", "'", "null"):
        env = {"EXPERTMESH_REDIS__PASSWORD": text, "EXPERTMESH_MODEL": "m"}
        assert load(MeshSettings, env=env).redis.read_password() == text


def test_serve_is_told_no_password() -> None:
    fields = {"group": "g", "model_dir": "d", "model": "m", "experts": "0"}
    with pytest.raises(ConfigError, match="redis_secrets") as refused:
        validate(ExpertGroupArgs, fields | {"redis_url": f"redis://:{PLAIN_PASSWORD}@h:1/0"})
    assert PLAIN_PASSWORD not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h:1/0", ("redis://h:1/0", None)),
        ("redis://u@h:1/0", ("redis://u@h:1/0", None)),
        ("redis://u:p%40@h:1/0", ("redis://u@h:1/0", "p@")),
        ("rediss://:p@h/2?db=3", ("rediss://h/2?db=3", "p")),
        ("unix:///run/redis.sock", ("unix:///run/redis.sock", None)),
    ],
)
def test_the_password_of_an_url(url: str, expected: tuple[str, str | None]) -> None:
    assert split_password(url) == expected


def test_connections_have_no_password_in_their_repr(
    server_repr: Callable[[], str],
) -> None:
    assert PLAIN_PASSWORD not in server_repr()


@pytest.fixture
def server_repr(tmp_path: Path) -> Callable[[], str]:
    """What a traceback or a debugger would show of a client."""
    file = tmp_path / "p"
    file.write_text(PLAIN_PASSWORD, "utf-8")
    secrets = RedisSecrets(password_file=str(file))
    return lambda: repr(connect("redis://h:1/0", secrets)) + repr(secrets)
