"""Every benchmark that needs nothing but this checkout runs, shortly; its numbers mean nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"hivemind", "ray_serve", "elastic", "startup", "growth", "flames"}
"""hivemind needs an environment of its own, the next three Ray, the last many processes."""


def benchmark(*args: str) -> "subprocess.CompletedProcess[str]":
    """`python -m benchmarks ...`, with results nowhere."""
    command = [sys.executable, "-m", "benchmarks", *args]
    path = os.pathsep.join(
        str(ROOT / root) for root in ("", "services", "router", "experts", "protos")
    )
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )


@pytest.mark.parametrize(
    ("name", "contestant"),
    [
        ("overhead", "ours"),
        ("dense", "ours, sparse"),
        ("telemetry", "on"),
        ("tls", "mutual TLS"),
        ("generation", "ours"),
        ("balance", "zipf 1.0, 512 token-slots"),
        ("churn", "zipf 1.0: controller"),
        ("moving", "moving"),
        ("throttled", "ours"),
        ("overload", "half of the maximum"),
        ("decision", "gate alone"),
        ("fidelity", "calls a second"),
    ],
)
def test_a_quick_run_prints_its_tables(name: str, contestant: str) -> None:
    done = benchmark(name, "--quick")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"# {name}\n")
    assert f"| {contestant} |" in done.stdout


def test_a_wrong_name_is_refused_with_the_right_ones() -> None:
    done = benchmark("overheads")
    assert done.returncode == 2
    assert "no benchmark overheads; there are hivemind, ray_serve, overhead" in done.stderr
