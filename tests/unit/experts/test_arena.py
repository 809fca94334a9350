"""Slots cost what the weights in them cost, and any of a shape takes any expert of it."""

from pathlib import Path

import pytest
import torch
from tests.checkpoints import FAMILIES, tiny_checkpoint

from expertmesh.experts.arena import Arena, SlotPlan, slot_plans
from expertmesh.experts.reader import ExpertReader
from expertmesh.experts.residency import ExpertKey
from expertmesh.experts.stack import CACHE_LINE_BYTES
from expertmesh.runtime.checkpoint import Checkpoint

CPU = torch.device("cpu")


def plans_of(
    path: Path, dtype: torch.dtype = torch.float32
) -> tuple[ExpertReader, dict[ExpertKey, SlotPlan]]:
    reader = ExpertReader(Checkpoint.open(path))
    held = {layer: tuple(range(reader.num_experts(layer))) for layer in reader.layers()}
    return reader, slot_plans(reader, held, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_slot_is_as_large_as_its_expert(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """To the byte where the file has no odd offsets; else what two alignments take."""
    reader, plans = plans_of(tiny_checkpoint(family, tmp_path), dtype)
    for key, plan in plans.items():
        spare_bytes = plan.num_bytes - reader.expert_bytes(key.layer, dtype)
        is_odd = any(reader.memory_offsets(key.layer, dtype))
        assert 0 <= spare_bytes <= (2 * CACHE_LINE_BYTES if is_odd else 0)


def test_slots_are_used_again_and_the_budget_holds(tmp_path: Path) -> None:
    _, plans = plans_of(tiny_checkpoint("mixtral", tmp_path))
    keys, each_bytes = sorted(plans), next(iter(plans.values())).num_bytes
    arena = Arena(plans, 2 * each_bytes, torch.float32, CPU)
    first, second = arena.take(keys[0]), arena.take(keys[9])
    assert arena.allocated_bytes == 2 * each_bytes
    address = first.memory.data_ptr()
    arena.give_back(first)
    assert arena.take(keys[1]).memory.data_ptr() == address
    assert second.memory.data_ptr() != address
    assert arena.allocated_bytes == 2 * each_bytes


def test_a_lower_budget_gives_free_slots_back(tmp_path: Path) -> None:
    _, plans = plans_of(tiny_checkpoint("mixtral", tmp_path))
    keys, each_bytes = sorted(plans), next(iter(plans.values())).num_bytes
    arena = Arena(plans, 4 * each_bytes, torch.float32, CPU)
    slots = [arena.take(key) for key in keys[:4]]
    arena.give_back(slots.pop())
    arena.set_budget(2 * each_bytes)
    assert arena.allocated_bytes == 3 * each_bytes, "in use, above the budget"
    arena.give_back(slots.pop())
    assert arena.allocated_bytes == 2 * each_bytes
    arena.set_budget(1 * each_bytes)
    arena.take(keys[5])  # ordered before the budget was lowered: it comes nevertheless
    assert arena.allocated_bytes == 3 * each_bytes


def test_weights_lie_as_they_would_among_all_of_the_layer(tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path, fused=True, intermediate_size=50)
    reader, plans = plans_of(path)
    arena = Arena(plans, 1 << 30, torch.float32, CPU)
    up_bytes, down_bytes = 2 * 50 * 64 * 4, 64 * 50 * 4
    for key in plans:
        stack = arena.take(key)
        at_up, at_down = reader.memory_offsets(key.layer, torch.float32)
        up, down = stack.up_SUD.data_ptr(), stack.down_SDF.data_ptr()
        assert (up - at_up - key.expert * up_bytes) % CACHE_LINE_BYTES == 0
        assert (down - at_down - key.expert * down_bytes) % CACHE_LINE_BYTES == 0
