"""`kubectl apply` rehearsed on this machine: see `tests/e2e/rehearsal`.

Not there: KubeRay's own code, a kubelet, CNI and CSI, pulls of images, GPUs, network policies.
"""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.rehearsal import outside

_STORY_S = 800.0

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happened."""
    if os.environ.get("REHEARSAL") != "1":
        pytest.skip("it runs by `make rehearsal`, until it has been seen to be steady")
    missing = outside.missing()
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"the rehearsal must run in CI: {missing}")
    if missing:
        pytest.skip(missing)
    logs = tmp_path_factory.mktemp("logs")
    found = _told(logs)
    assert "failed" not in found, f"{found['failed']}\n{found['logs']}\nlogs of Ray: {logs}"
    return found


def _told(logs: Path) -> dict[str, Any]:
    """Namespaces end with the process, whatever happens."""
    process = subprocess.Popen(
        outside.command(str(logs)), stdout=subprocess.PIPE, text=True, cwd=outside.ROOT
    )
    try:
        said, _ = process.communicate(timeout=_STORY_S)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def test_everything_starts_and_nothing_starts_twice(story: dict[str, Any]) -> None:
    assert {name: ended for name, ended in story["pods"].items() if ended} == {}
    owners = [name.partition("-rehearse-")[2].partition("-")[0] or name for name in story["pods"]]
    assert owners.count("head") == 1
    assert owners.count("experts") == 2


def test_no_call_fails_and_no_token_differs(story: dict[str, Any]) -> None:
    """While the head dies, a worker dies, everything is rolled, and a group grows and shrinks."""
    calls = story["calls"]
    assert (calls["errors"], calls["different"]) == ([], 0)
    assert calls["done"] > 60


def test_a_new_head_remembers_everything(story: dict[str, Any]) -> None:
    """Nobody hands Serve its configuration again, and no replica is started anew."""
    assert story["head"] == {"puts": 0, "same_replicas": True}


def test_a_change_of_the_configuration_keeps_replicas(story: dict[str, Any]) -> None:
    assert story["change"]["same_replicas"]
    kinds = {line.partition("/")[0] for line in story["change"]["lines"]}
    kinds -= {"poddisruptionbudget.policy"}  # kubectl sends those with replaced selectors always
    assert kinds == {"configmap", "deployment.apps", "rayservice.ray.io"}


def test_load_brings_a_pod(story: dict[str, Any]) -> None:
    assert 3 in story["grown"].values()


def test_a_worker_that_is_drained_moves_its_replicas_before(story: dict[str, Any]) -> None:
    [said] = story["drained"]["said"]
    assert said.startswith("preStop ended with 0: drained in ")


def test_every_container_keeps_to_its_memory(story: dict[str, Any]) -> None:
    assert len(story["memory"]) >= 7
    for name, (taken_mib, limit_mib) in story["memory"].items():
        assert 0 < taken_mib < limit_mib, name
