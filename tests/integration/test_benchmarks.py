"""Every benchmark that needs nothing but this checkout runs, shortly; its numbers mean nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"hivemind", "ray_serve", "startup", "growth"}
"""hivemind needs an environment of its own, the next two Ray, the last many processes."""


def benchmark(*args: str) -> "subprocess.CompletedProcess[str]":
    """`python -m benchmarks ...`, with results nowhere."""
    command = [sys.executable, "-m", "benchmarks", *args]
    path = os.pathsep.join(
        str(ROOT / root) for root in ("", "services", "router", "experts", "protos")
    )
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )


@pytest.mark.parametrize("name", ["overhead", "dense", "telemetry", "generation"])
def test_a_quick_run_prints_its_tables(name: str) -> None:
    done = benchmark(name, "--quick")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"# {name}\n")
    assert "| ours |" in done.stdout or "| ours, sparse |" in done.stdout or "| on |" in done.stdout


def test_a_wrong_name_is_refused_with_the_right_ones() -> None:
    done = benchmark("overheads")
    assert done.returncode == 2
    assert "no benchmark overheads; there are hivemind, ray_serve, overhead" in done.stderr
