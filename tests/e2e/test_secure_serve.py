"""`expertmesh serve` as docs/security.md closes it, and a Redis with a password besides. And
no secret shows where others look: in the arguments of processes, and in the logs of Ray.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from tests.e2e.cluster import LoopThread
from tests.e2e.readme import ROOT
from tests.e2e.served import STOP_S, endpoints_of, environment

from expertmesh.runtime.redis_server import EmbeddedRedis
from expertmesh.services.cli import USER_ERROR

PAGE = (ROOT / "docs/security.md").read_text("utf-8")
PASSWORD = "a-password-that-no-log-may-have"
SESSION = re.compile(r"/[^ =]*/session_[0-9_-]+")
"""Of Ray, as its processes name it."""

pytestmark = pytest.mark.timeout(420)


@dataclass(frozen=True)
class Secure:
    """A running mesh, and the folder with what docs/security.md makes in it."""

    process: "subprocess.Popen[str]"
    endpoints: dict[str, str]
    folder: Path

    @property
    def token(self) -> str:
        """The caller's."""
        return (self.folder / "alice.token").read_text("utf-8").strip()

    def run(self, line: str, server: str) -> "subprocess.CompletedProcess[str]":
        """One command line of ours, against the router or the gateway."""
        return shell(f"{line} --target {self.endpoints[server]}", self.folder)


def blocks(language: str) -> list[str]:
    """The fenced blocks of docs/security.md."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def shell(script: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run by bash, as a user would in a terminal with the venv."""
    command = ["bash", "-euc", script]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment())


def write_configuration(folder: Path) -> Path:
    """What the page says, and what a test needs besides."""
    for script in blocks("sh"):
        done = shell(script, folder)
        assert done.returncode == 0, done.stderr
    settings = yaml.safe_load(blocks("yaml")[0]) | {
        "model": str(ROOT / "examples/demo-moe"),
        "router": {"port": 0},
        "gateway": {"port": 0},
        "experts": {"groups": 2, "local_socket": False},
    }
    config = folder / "mesh.yaml"
    config.write_text(json.dumps(settings), "utf-8")
    return config


@contextmanager
def redis_server() -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(password=PASSWORD)
    with LoopThread() as loop:
        loop.run(server.__aenter__())
        try:
            yield server
        finally:
            loop.run(server.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    folder = tmp_path_factory.mktemp("secure")
    config = write_configuration(folder)
    with redis_server() as redis:
        url = redis.url.replace("redis://", f"redis://:{PASSWORD}@")
        process = subprocess.Popen(
            [sys.executable, "-m", "expertmesh.services.cli", "serve", "--config", str(config)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment() | {"EXPERTMESH_REDIS__URL": url},
        )
        try:
            yield Secure(process, endpoints_of(process), folder)
        finally:
            process.terminate()
            assert process.wait(STOP_S) == 0


def test_the_commands_of_the_page(secure: Secure) -> None:
    status, generate = blocks("text")[0].splitlines()
    done = secure.run(status, "router")
    assert done.returncode == 0, done.stderr
    assert "2 replicas" in done.stdout
    done = secure.run(generate, "gateway")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_program_of_the_page(secure: Secure) -> None:
    gateway = secure.endpoints["gateway"].replace("127.0.0.1", "localhost")
    program = blocks("python")[0].replace("localhost:50052", gateway)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=secure.folder
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_rows_went_to_replicas_over_certificates(secure: Secure) -> None:
    flags = "--tls-ca ca.crt --token-file alice.token"
    view = json.loads(secure.run(f"expertmesh status --json {flags}", "router").stdout)
    assert {own["state"]["group"] for own in view["replicas"]} == {"g0", "g1"}
    assert sum(int(own["state"]["load"].get("done_rows", 0)) for own in view["replicas"]) > 0


def test_who_may_not_is_told_why(secure: Secure) -> None:
    done = secure.run("expertmesh status --once --tls-ca ca.crt", "router")
    assert done.returncode == USER_ERROR
    assert "Bearer TOKEN" in done.stderr
    done = secure.run("expertmesh explain --tls-ca ca.crt --token-file alice.token", "router")
    assert done.returncode == USER_ERROR
    assert "lacks the scope 'route'" in done.stderr


def test_no_secret_shows_in_arguments_or_logs(secure: Secure) -> None:
    serve = psutil.Process(secure.process.pid)
    arguments = [" ".join(own.cmdline()) for own in (serve, *serve.children(recursive=True))]
    session = next(found for line in arguments if (found := SESSION.search(line)))
    logs = [file for file in Path(session[0], "logs").rglob("*") if file.is_file()]
    assert any("redis_secrets" in file.read_text("utf-8", "replace") for file in logs)
    for secret in (PASSWORD, secure.token):
        assert not [line for line in arguments if secret in line]
        assert not [file for file in logs if secret in file.read_text("utf-8", "replace")]
