"""A Ray node that is lost without a word: its replicas are replaced, and no answer is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.checkpoints import tiny_checkpoint
from tests.e2e.readme import ROOT

pytestmark = pytest.mark.timeout(400)


def test_groups_are_replaced_after_the_loss_of_a_node(tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path)
    command = [sys.executable, "-W", "ignore", "-m", "tests.e2e.lost_node", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    story = json.loads(done.stdout.splitlines()[-1])
    assert set(story["before"]) == {"127.0.0.2", "127.0.0.3"}, story
    assert len(story["after"]) == 4
    assert len(set(story["after"])) == 1
    assert story["inexact"] == 0, story
    assert story["exact"] > 10
