"""Rows per layer and expert, counted as they are routed."""

from expertmesh.router.plan import slots_by_expert
from expertmesh.router.usage import ExpertUsage
from expertmesh.v1 import control_pb2 as pb


def rows(usage: ExpertUsage) -> dict[int, list[int]]:
    """Counts by layer."""
    return {layer.layer: list(layer.rows) for layer in usage.to_proto().layers}


def test_nothing_was_used_at_first() -> None:
    usage = ExpertUsage({7: 3, 2: 1})
    assert usage.to_proto() == pb.GetExpertUsageResponse(
        layers=[pb.LayerUsage(layer=2, rows=[0]), pb.LayerUsage(layer=7, rows=[0, 0, 0])]
    )


def test_calls_add_up_by_layer_and_expert() -> None:
    usage = ExpertUsage({2: 4, 7: 2})
    usage.count(2, slots_by_expert([3, 0, 3], range(3)))
    usage.count(2, slots_by_expert([3], range(1)))
    usage.count(7, slots_by_expert([1, 1], range(2)))
    assert rows(usage) == {2: [1, 0, 0, 3], 7: [0, 2]}


def test_counts_outgrow_32_bits() -> None:
    usage = ExpertUsage({0: 1})
    usage.count(0, {0: range(2**33)})
    assert rows(usage) == {0: [2**33]}


def test_models_do_not_share_counts() -> None:
    sizes = {0: 1}
    usage, other = ExpertUsage(sizes), ExpertUsage(sizes)
    usage.count(0, {0: [0]})
    assert rows(other) == {0: [0]}
