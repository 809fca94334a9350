"""From `expertmesh serve` to the first token, beside what Ray Serve alone takes."""

import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.harness.report import Bar, Report, Row
from expertmesh.client import Client
from expertmesh.runtime.child import dying_with_parent

GROUPS = 4
_DEMO = Path(__file__).parents[1] / "examples" / "demo-moe"
_CHECKOUT = Path(__file__).parents[1]
_TOTAL_S = 20.0
_OURS_S = 6.0
_ABOUT = (
    f"`expertmesh serve` of the demo model ({GROUPS} groups and a gateway: {GROUPS + 1} Serve "
    "applications) until a client has the first token of its first call. **Ray Serve alone** is a "
    f"process that starts Ray and Serve the same way and deploys {GROUPS + 1} applications that "
    "hold nothing and import nothing of ours, until all run. Ours is the difference of two starts "
    "next to each other. They take turns, every other round in reverse order, and begin when the "
    "machine has been idle; medians. Byte code and files are warm, as from the second start on."
)
_QUIET_FRAC = 0.1  # of the machine's CPU time, for the moment before a start
_QUIET_WAIT_S = 60.0
_STEP = re.compile(r"^\[ *([\d.]+) s\] (.*)$")


def _environment() -> dict[str, str]:
    """The caller's, in which Python keeps byte code as it does unless told otherwise."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": str(_CHECKOUT)}


def _wait_until_quiet() -> None:
    deadline_s = time.monotonic() + _QUIET_WAIT_S
    psutil.cpu_percent()
    while time.monotonic() < deadline_s:
        if psutil.cpu_percent(interval=1.0) < _QUIET_FRAC * 100:
            return
    print("the machine is busy with something else: starts take longer", file=sys.stderr)


@contextmanager
def _started(command: list[str]) -> Iterator[tuple["subprocess.Popen[str]", float]]:
    """The process and when it was started; on leaving it is asked to stop and waited for."""
    _wait_until_quiet()
    started_s = time.monotonic()
    process = subprocess.Popen(
        dying_with_parent(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
    )
    try:
        yield process, started_s
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _serve_s() -> dict[str, float]:
    """Seconds from the command until each step."""
    steps: dict[str, float] = {}
    command = [sys.executable, "-m", "expertmesh.services.cli", "serve", str(_DEMO)]
    with _started([*command, "--groups", str(GROUPS)]) as (process, started_s):
        errors = threading.Thread(target=_note_steps, args=(process, started_s, steps))
        errors.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("gateway"):
                with Client(line.split()[1]) as client:
                    next(iter(client.generate([5, 6, 7], max_new_tokens=1)))
                steps["first token"] = time.monotonic() - started_s
                break
        else:
            raise SystemExit(f"error: serve ended early after {steps}")
    errors.join()
    return steps


def _note_steps(process: subprocess.Popen[str], started_s: float, steps: dict[str, float]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if (step := _STEP.match(line)) and "first token" not in steps:
            text = re.sub(r"[\d.:]+|\([^)]*\)", "", step[2]).strip()
            steps.setdefault(text, time.monotonic() - started_s)


def _ray_alone_s() -> float:
    command = [sys.executable, "-m", "benchmarks.noop_serve", str(GROUPS + 1)]
    with _started(command) as (process, started_s):
        assert process.stdout is not None
        line = process.stdout.readline()
        took_s = time.monotonic() - started_s
        assert line == "running\n", "Ray Serve did not start"
        process.communicate()
    return took_s


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("startup", _ABOUT)
    serves: list[dict[str, float]] = []
    alone: list[float] = []
    for round_number in range(1 if quick else 4):
        if round_number % 2:
            alone.append(_ray_alone_s())
        serves.append(_serve_s())
        if not round_number % 2:
            alone.append(_ray_alone_s())
    total_s = statistics.median(steps["first token"] for steps in serves)
    ours_s = statistics.median(
        steps["first token"] - ray_s for steps, ray_s in zip(serves, alone, strict=True)
    )
    report.bars += [
        Bar("to the first token", total_s, _TOTAL_S, True, "s"),
        Bar("of it ours", ours_s, _OURS_S, True, "s"),
    ]
    common = [name for name in serves[0] if all(name in steps for steps in serves)]
    rows: list[Row] = [
        {"step": name, "s from the command": statistics.median(s[name] for s in serves)}
        for name in common
    ]
    rows.append(
        {"step": "(Ray Serve alone: running)", "s from the command": statistics.median(alone)}
    )
    report.tables["Steps"] = rows
    report.raw = {"serve": serves, "ray alone": alone}
    return report
