"""README's commands outside of a running mesh, each run as it stands there."""

import subprocess
import sys

import pytest
from tests.e2e.readme import ROOT, commands
from tests.e2e.served import environment

KNOWN = (
    "git clone", "make demo", "make test", "make parity", "source .venv/bin/activate",
    "expertmesh inspect", "expertmesh serve", "expertmesh status", "expertmesh generate",
    "expertmesh plan", "expertmesh simulate", "kubectl ",
)  # fmt: skip

pytestmark = pytest.mark.timeout(400)


def make(line: str) -> "subprocess.CompletedProcess[str]":
    """Run one of README's make lines in this checkout."""
    return subprocess.run(
        ["bash", "-ec", line], capture_output=True, text=True, cwd=ROOT, env=environment()
    )


def test_every_command_is_run_by_some_test() -> None:
    """The others are run in test_serve.py; a new kind of command needs a test first."""
    for line in commands():
        assert line.startswith(KNOWN), f"README has a command that no test runs: {line}"


def test_plan_places_the_demo_model() -> None:
    line = next(line for line in commands() if line.startswith("expertmesh plan"))
    done = make(f"{sys.executable} -m expertmesh.services.cli {line.removeprefix('expertmesh ')}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0-7 of 4 layers" in done.stdout


def test_make_demo_proves_that_it_is_exact() -> None:
    done = make("make demo")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal, bit for bit" in done.stdout
    for domain in ("english", "scripture", "python", "cpp"):
        assert f"\n{domain}\n" in done.stdout
    assert "valkey-server" in done.stderr or "redis-server" in done.stderr


def test_make_test_runs_the_whole_suite() -> None:
    """It is what runs this; so only what it would run is looked at."""
    done = make("make -n test")
    assert done.returncode == 0
    for tier in ("tests/unit", "tests/integration", "tests/k8s", "tests/e2e"):
        assert tier in done.stdout


def test_make_parity_prints_the_verdict() -> None:
    line = next(line for line in commands() if line.startswith("make parity"))
    done = make(line)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "demo-moe: EXACT against transformers" in done.stdout
