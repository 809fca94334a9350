"""`expertmesh plan --live`: what the controller of a running mesh thinks."""

import grpc
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from expertmesh.client.failures import error_of
from expertmesh.experts.sizing import format_bytes
from expertmesh.runtime.channels import connect_blocking
from expertmesh.runtime.security.access import PLAIN, Access
from expertmesh.v1 import placement_pb2 as pb
from expertmesh.v1 import placement_pb2_grpc

_TIMEOUT_S = 5.0
_BOX = box.SIMPLE_HEAD


def read_plan(target: str, access: Access = PLAIN) -> pb.PlacementPlan:
    """The newest plan.

    Raises:
        Unavailable: nobody answers at the target.
    """
    with connect_blocking(target, access) as channel:
        stub = placement_pb2_grpc.ControllerServiceStub(channel)
        try:
            return stub.GetPlan(pb.GetPlanRequest(), timeout=_TIMEOUT_S, metadata=access.metadata())
        except grpc.RpcError as failure:
            raise error_of(failure) from None


def render_plan(plan: pb.PlacementPlan) -> None:
    """For people."""
    console = Console(highlight=False)
    mode = "moves experts" if plan.executes else "only tells"
    console.print(f"[bold]controller[/]  epoch {plan.epoch}, window {plan.window}, {mode}")
    console.print(f"[bold]verdict[/]     {escape(plan.reason)}")
    if plan.last_move:
        console.print(f"[bold]last move[/]   {escape(plan.last_move)}")
    if plan.layers:
        table = Table(
            "layer", "max/mean", "bound", "of it chance", "bad windows", "after", box=_BOX
        )
        for own in plan.layers:
            after = f"{own.ratio_after:.3f}" if own.ratio_after else ""
            numbers = f"{own.ratio:.3f}", f"{own.bound:.3f}", f"{own.noise:.3f}"
            table.add_row(str(own.layer), *numbers, str(own.bad_windows), after)
        console.print(table)
    for title, moves in (("proposed", plan.moves), ("under way", [plan.under_way])):
        for move in moves:
            if move.steps:
                size = format_bytes(move.num_bytes)
                console.print(f"{title}: {escape(_in_words(move))} ({size})")


def _in_words(move: pb.PlacementMove) -> str:
    return ", ".join(
        f"{'add' if step.add else 'drop'} layer {step.layer} expert {step.expert} "
        f"{'to' if step.add else 'from'} {step.replica}"
        for step in move.steps
    )
