"""Reads a replica's load for the rule of scaling."""

import time

from expertmesh.experts.batcher import MicroBatcher
from expertmesh.experts.load_report import ReplicaReport
from expertmesh.runtime.device import DeviceReading

_PROCESS_BYTES = 350 << 20
"""What a replica takes beside its weights: Python, torch and Ray (docs/operations.md)."""


def load_report(batcher: MicroBatcher, device: DeviceReading, weight_bytes: int) -> ReplicaReport:
    """The load now. Runs on the event loop, whose CPU time is part of it.

    Memory is told on the CPU only: which GPU another replica would get is Ray's to say.
    """
    stats, now_s = batcher.stats, time.monotonic()
    is_cpu = device.kind == "cpu"
    return ReplicaReport(
        now_s,
        arrived_rows=stats.arrived_rows,
        done_rows=stats.done_rows,
        busy_s=stats.busy_until(now_s),
        loop_s=time.thread_time(),
        waited_row_s=stats.waited_row_s,
        oldest_wait_s=batcher.oldest_wait_s(),
        queued_rows=stats.queued_rows,
        row_time_us=stats.row_time_us,
        free_bytes=device.free_bytes if is_cpu else 0,
        need_bytes=weight_bytes + _PROCESS_BYTES if is_cpu else 0,
    )
