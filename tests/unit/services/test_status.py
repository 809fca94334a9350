"""The table of `expertmesh status`."""

import io

import pytest
from rich.console import Console
from tests.fakes import GIB, holds, replica_state

from expertmesh.services.status import table
from expertmesh.v1 import control_pb2 as pb


def shown(*views: pb.ReplicaView, connected: bool = True) -> str:
    """The table as text, one space between words."""
    snapshot = pb.GetSnapshotResponse(
        mesh="prod", replicas=views, redis_connected=connected, redis_age_ms=1234
    )
    console = Console(file=io.StringIO(), width=400)
    console.print(table(snapshot))
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


READY = pb.ReplicaView(
    state=replica_state(
        "r7",
        address="10.0.0.1:5000",
        weight_bytes=3 * GIB,
        holds=holds({0: [0, 1, 2, 7], 4: [0, 1, 2, 7]}),
        device=pb.DeviceState(
            kind="cuda", free_bytes=GIB, total_bytes=24 * GIB, utilisation_frac=0.756
        ),
        load=pb.ReplicaLoad(queued_rows=12, row_time_us=34.6, done_rows=5678),
    ),
    age_ms=90,
)


def test_a_replica_is_one_row() -> None:
    text = shown(READY)
    memory = "cuda 1.00 GiB of 24.00 GiB"
    assert f"g0 r7 ready 0-2,7 3.00 GiB {memory} 76% 12 35 5678 0.1 s" in text
    assert "mesh prod: 1 replicas, redis answers (heard 1.2 s ago)" in text


def test_what_is_resident_is_told_where_not_everything_is() -> None:
    view = pb.ReplicaView()
    view.CopyFrom(READY)
    view.state.residency.resident_bytes = GIB
    assert " 1.00 GiB of 3.00 GiB cuda " in shown(view)


def test_missing_experts_are_loud() -> None:
    gaps = [
        pb.LayerExperts(layer=layer, experts=ids)
        for layer, ids in ((0, [4, 5]), (1, [4, 5]), (7, [2]))
    ]
    snapshot = pb.GetSnapshotResponse(mesh="prod", redis_connected=True, missing=gaps)
    console = Console(file=io.StringIO(), width=400)
    console.print(table(snapshot))
    assert isinstance(console.file, io.StringIO)
    text = "MISSING, no live replica: experts 4-5 of layers 0-1; experts 2 of layers 7"
    assert text in console.file.getvalue()
    assert "MISSING" not in shown(READY)


def test_an_absent_redis_is_loud() -> None:
    assert "REDIS AWAY, routing goes on" in shown(connected=False)


@pytest.mark.parametrize(
    ("view", "text"),
    [
        (pb.ReplicaView(state=replica_state(status=pb.REPLICA_STATUS_DRAINING)), "draining"),
        (pb.ReplicaView(state=replica_state(), set_aside="stream broke"), "aside: stream broke"),
        (pb.ReplicaView(state=replica_state(holds=holds({0: [0], 1: [0, 1]}))), "3 in all"),
        (pb.ReplicaView(state=replica_state(holds=[])), "0 in all"),
    ],
)
def test_what_a_row_can_say(view: pb.ReplicaView, text: str) -> None:
    assert f" {text} " in shown(view)


def test_text_of_others_is_not_markup() -> None:
    view = pb.ReplicaView(state=replica_state("[red]r"), set_aside="[/usr] closed")
    assert "[red]r aside: [/usr] closed " in shown(view)
