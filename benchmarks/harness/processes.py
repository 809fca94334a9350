"""What processes cost: CPU seconds and memory, read from /proc."""

import os
from collections.abc import Iterable
from pathlib import Path

import psutil

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def with_descendants(pids: Iterable[int]) -> set[int]:
    """The processes and all that they started, as far as they live; never this one."""
    found: set[int] = set()
    for pid in pids:
        try:
            process = psutil.Process(pid)
            found |= {pid, *(child.pid for child in process.children(recursive=True))}
        except psutil.NoSuchProcess:
            continue
    return found - {os.getpid()}


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of the processes that live, to the nanosecond if the kernel tells."""
    return sum(_cpu_seconds(pid) for pid in pids)


def _cpu_seconds(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task")
    try:
        on_cpu_ns = [int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()]
        return sum(on_cpu_ns) / 1e9
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return _cpu_ticks(pid) / _TICKS_PER_S


def _cpu_ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(fields[11]) + int(fields[12])


def pss_bytes(pid: int) -> int:
    """Proportional memory of a process: shared pages count by the share it has of them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
