"""Records where a running process spends its CPU time, with py-spy and the kernel's clocks."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness.stacks import Stack, ThreadTime, read_raw, weighed

_GRACE_S = 30.0


def record(pid: int, seconds: float, rate_hz: int) -> dict[Stack, float]:
    """CPU seconds of every stack of the process in the next `seconds`."""
    before = _threads(pid)
    samples = read_raw(_raw(pid, seconds, rate_hz))
    return weighed(samples, _since(before, _threads(pid)))


def _since(before: dict[str, ThreadTime], after: dict[str, ThreadTime]) -> dict[str, ThreadTime]:
    spent = {}
    for thread, (name, cpu_s, queued_s) in after.items():
        _, cpu_before_s, queued_before_s = before.get(thread, ThreadTime(name, 0.0, 0.0))
        spent[thread] = ThreadTime(name, cpu_s - cpu_before_s, queued_s - queued_before_s)
    return spent


def _raw(pid: int, seconds: float, rate_hz: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "raw"
        command: list[object] = [_executable(), "record", "--pid", pid, "--format", "raw"]
        command += ["--duration", round(seconds), "--rate", rate_hz, "--output", path]
        command += ["--threads", "--nolineno", "--full-filenames", "--nonblocking"]
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            timeout=seconds + _GRACE_S,
        )
        if done.returncode:
            raise SystemExit(f"error: py-spy cannot look into a process: {done.stderr.strip()}")
        return path.read_text()


def _executable() -> str:
    beside = Path(sys.executable).with_name("py-spy")
    found = str(beside) if beside.exists() else shutil.which("py-spy")
    if not found:
        raise SystemExit("error: no py-spy; install expertmesh[bench]")
    return found


def _threads(pid: int) -> dict[str, ThreadTime]:
    """Of the process's life until now, by thread id."""
    threads = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            on_cpu_ns, queued_ns, _ = map(int, (task / "schedstat").read_text().split())
            name = (task / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        threads[task.name] = ThreadTime(name, on_cpu_ns / 1e9, queued_ns / 1e9)
    return threads
