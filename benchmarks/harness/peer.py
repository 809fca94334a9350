"""hivemind in an environment of its own, measured by a script written for it alone."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness.report import RESULTS

_CACHE = RESULTS.parent / ".cache"
_ATTEMPTS = 5
_FIRST_LINE_S = 45.0
_TIMEOUT_S = 150.0
_POLL_S = 0.5
_REQUIREMENTS = ("torch==2.13.0", "hivemind==1.1.12")

PeerRow = dict[str, float]


def peer_python() -> Path:
    """A Python with hivemind: EXPERTMESH_HIVEMIND_PYTHON, else a venv made here once."""
    if given := os.environ.get("EXPERTMESH_HIVEMIND_PYTHON"):
        return Path(given)
    venv = _CACHE / "hivemind-venv"
    python = venv / "bin" / "python"
    if not (venv / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *_REQUIREMENTS], check=True)
        (venv / ".ready").touch()
    return python


def peer_script() -> Path:
    """hivemind_bench.py, in EXPERTMESH_PEERS or beside the checkout."""
    folder = os.environ.get("EXPERTMESH_PEERS", RESULTS.parents[2] / "shared" / "peers")
    script = Path(folder) / "hivemind_bench.py"
    if not script.exists():
        raise SystemExit(f"error: no {script}; set EXPERTMESH_PEERS to the folder that has it")
    return script


def _finishes(command: list[str], log: Path) -> bool:
    """Whether the script ends well by itself: now and then its daemons wait for each other for
    ever, before the first line of output; and always if stdin is /dev/null."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True
        )
        started_s = time.monotonic()
        while process.poll() is None:
            time.sleep(_POLL_S)
            took_s = time.monotonic() - started_s
            if took_s > (_TIMEOUT_S if log.stat().st_size else _FIRST_LINE_S):
                os.killpg(process.pid, signal.SIGKILL)
        return process.wait() == 0


def run_peer(
    hidden_size: int, batches: list[int], seconds: float
) -> dict[tuple[int, str], PeerRow]:
    """One run of the script: its row for every (batch, mode)."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command: list[object] = [peer_python(), peer_script(), "--hidden", hidden_size]
        command += ["--batch", *batches, "--modes", "grouped", "moe", "--seconds", seconds]
        command += ["--min-iters", 3, "--json", result]
        log = Path(folder) / "log"
        for attempt in range(_ATTEMPTS):
            if _finishes([str(part) for part in command], log):
                break
            print(f"hivemind attempt {attempt + 1} did not end well", file=sys.stderr)
        else:
            raise SystemExit(f"error: hivemind's benchmark failed:\n{log.read_text()[-2000:]}")
        rows = json.loads(result.read_text())["results"]
    return {(row["batch"], row["mode"]): row for row in rows}
