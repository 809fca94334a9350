"""The manifests' Redis servers by their own commands: they ask for a password, in no argument."""

import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import redis
from redis.exceptions import AuthenticationError
from tests.k8s.kuberay import pods
from tests.k8s.rendering import rendered

from expertmesh.runtime.redis_server import find_server
from expertmesh.services.local import free_port

PASSWORD = "0123456789abcdef" * 3


def command_of(name: str, folder: Path, port: int) -> list[str]:
    """The container's command, with paths and port of this machine."""
    [pod] = [
        own for own in pods(rendered("base")) if own.labels.get("app.kubernetes.io/name") == name
    ]
    [*shell, script] = pod.spec["containers"][0]["command"]
    script, times = re.subn(r"\bredis-server\b", str(find_server().path), script)
    assert times == 1
    for old, new in (
        ("/etc/redis-password/", f"{folder}/"),
        ("port 6379", f"port {port}\nbind 127.0.0.1"),
        ("dir /data", f"dir {folder}"),
    ):
        assert old in script or name == "redis-state"
        script = script.replace(old, new)
    return [*shell, script]


@pytest.mark.parametrize(("name", "keeps"), [("redis-state", "no"), ("redis-gcs", "yes")])
def test_a_server_asks_for_the_password_of_its_secret(
    name: str, keeps: str, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text(PASSWORD + "\n")
    port = free_port("127.0.0.1")
    with subprocess.Popen(command_of(name, tmp_path, port), cwd=tmp_path) as process:
        try:
            stranger = redis.Redis(port=port, retry_on_error=[], socket_timeout=30)
            friend = redis.Redis(port=port, password=PASSWORD, socket_timeout=30)
            ready(friend)
            assert friend.config_get("appendonly") == {"appendonly": keeps}
            assert friend.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            with pytest.raises(AuthenticationError):
                stranger.ping()
            assert PASSWORD not in " ".join(psutil.Process(process.pid).cmdline())
        finally:
            process.terminate()


def ready(client: "redis.Redis") -> None:
    """Until it answers."""
    for _ in range(300):
        try:
            client.ping()
        except redis.exceptions.ConnectionError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("no answer")
