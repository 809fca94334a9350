"""A Ray node that is drained, as a Pod is before it is deleted, loses no call."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.checkpoints import tiny_checkpoint
from tests.e2e.readme import ROOT

pytestmark = pytest.mark.timeout(200)


def test_replicas_move_before_their_node_goes(tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path)
    command = [sys.executable, "-W", "ignore", "-m", "tests.e2e.two_nodes", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    story = json.loads(done.stdout.splitlines()[-1])
    assert story["code"] == 0, story
    assert story["said"].startswith("drained in ")
    assert len(story["before"]) == len(story["after"]) == 1
    assert {*story["before"], *story["after"]} == {"127.0.0.2", "127.0.0.3"}
    assert story["calls"] > 10
