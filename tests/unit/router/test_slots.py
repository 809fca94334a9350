"""Memory shared out among layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.router.placement import plan_placement
from expertmesh.router.slots import share_slots
from expertmesh.runtime.errors import InsufficientMemory

LAYERS = st.dictionaries(
    st.integers(0, 9),
    st.tuples(st.integers(1, 9), st.lists(st.floats(0, 10), min_size=1, max_size=9)),
    min_size=1,
    max_size=4,
)


@given(LAYERS, st.lists(st.integers(0, 300), min_size=1, max_size=5))
def test_every_expert_has_a_place_within_the_memory(
    layers: dict[int, tuple[int, list[float]]], rooms: list[int]
) -> None:
    expert_bytes = {layer: size for layer, (size, _) in layers.items()}
    loads = {layer: own for layer, (_, own) in layers.items()}
    needed = sum(expert_bytes[layer] * len(own) for layer, own in loads.items())
    try:
        slots = share_slots(rooms, expert_bytes, loads)
    except InsufficientMemory:
        slack = max(expert_bytes.values()) * len(rooms)
        assert needed > sum(rooms) - slack, "only for want of bytes, or of whole places"
        return
    for own, room in enumerate(rooms):
        assert sum(expert_bytes[layer] * slots[layer][own] for layer in layers) <= room
    for layer, own_loads in loads.items():
        assert sum(slots[layer]) >= len(own_loads)
        assert max(slots[layer]) <= len(own_loads)
        assert all(plan_placement(own_loads, [1.0] * len(rooms), slots[layer]))


def test_room_for_everything_is_used() -> None:
    assert share_slots([100] * 3, {0: 1, 1: 2}, {0: [1.0] * 8, 1: [1.0] * 4}) == {
        0: [8] * 3,
        1: [4] * 3,
    }


def test_layers_alike_get_alike() -> None:
    slots = share_slots([13] * 3, dict.fromkeys(range(4), 1), dict.fromkeys(range(4), [1.0] * 8))
    assert [sum(own) for own in slots.values()] == [10, 10, 10, 9]


def test_what_is_left_goes_to_the_uneven_layer() -> None:
    uneven = [100.0, *[1.0] * 7]
    slots = share_slots([5, 5, 5, 4], {0: 1, 1: 1}, {0: [1.0] * 8, 1: uneven})
    assert [sum(slots[layer]) - 8 for layer in (0, 1)] == [1, 2]


def test_the_missing_bytes_are_named() -> None:
    with pytest.raises(InsufficientMemory, match=r"need 80 bytes, the 2 replicas have 70 .* 10 by"):
        share_slots([40, 30], {3: 10}, {3: [1.0] * 8})
    with pytest.raises(InsufficientMemory, match=r"layer 3 needs 10 bytes, .* more than 9 left: 1"):
        share_slots([49, 39], {3: 10}, {3: [1.0] * 8})
