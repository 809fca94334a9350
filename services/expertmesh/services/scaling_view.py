"""Decisions on scaling, for people."""

from rich import box
from rich.markup import escape
from rich.table import Table

from expertmesh.services.durations import format_duration
from expertmesh.v1 import control_pb2


def table(decisions: control_pb2.GetScalingResponse) -> Table:
    """One row per group."""
    shown = Table("group", "mode", "ready", "wanted", "load", "wait", "why", box=box.SIMPLE_HEAD)
    for decision in decisions.groups:
        shown.add_row(*map(escape, _row(decision)))
    return shown


def _row(decision: control_pb2.GroupScaling) -> list[str]:
    mode = control_pb2.ScalingMode.Name(decision.mode).removeprefix("SCALING_MODE_").lower()
    why = f"{decision.reason}: {decision.text}"
    if decision.HasField("override"):
        left = format_duration(decision.override.left_ms / 1e3)
        why = f"{decision.override.replicas} set by hand, {left} left"
    return [
        decision.group,
        mode,
        f"{decision.ready} of {decision.present}",
        str(decision.wanted),
        f"{decision.demand:.2f}",
        f"{decision.queue_time_us / 1e3:.1f} ms",
        why,
    ]
