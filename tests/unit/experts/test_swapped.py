"""SwappedFFN beside ExpertFFN, bit for bit, however few experts the device holds at once."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import FAMILIES, fp8_checkpoint, mxfp4_checkpoint, tiny_checkpoint
from tests.reference_experts import load_ffn

from expertmesh.experts.arena import slot_plans
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.experts.reader import ExpertReader
from expertmesh.experts.swapping import Swapping, swapping
from expertmesh.runtime.checkpoint import Checkpoint

DTYPES = [torch.float32, torch.bfloat16]


@contextmanager
def swapped(path: Path, dtype: torch.dtype, num_slots: int, **args: Any) -> Iterator[Swapping]:
    """All experts of a checkpoint on a device that holds a few of them."""
    reader = ExpertReader(Checkpoint.open(path))
    held = {layer: tuple(range(reader.num_experts(layer))) for layer in reader.layers()}
    plans = slot_plans(reader, held, dtype)
    budget_bytes = num_slots * max(plan.num_bytes for plan in plans.values())
    group = ExpertGroupArgs(
        group="g0", model_dir=str(path), model="tiny", experts="0-7", redis_url="", **args
    )
    made = swapping(reader, plans, budget_bytes, dtype, torch.device("cpu"), group)
    made.loader.start()
    try:
        yield made
    finally:
        made.loader.close()


def random_batch(num_rows: int, num_experts: int = 8) -> tuple[list[int], list[int]]:
    """Experts, and rows of each."""
    chosen = torch.randint(num_experts, (num_rows,)).sort().values
    experts, counts = torch.unique_consecutive(chosen, return_counts=True)
    return experts.tolist(), counts.tolist()


def assert_same_bits(path: Path, dtype: torch.dtype, num_slots: int, **args: Any) -> None:
    torch.manual_seed(2)
    with swapped(path, dtype, num_slots, **args) as made:
        for layer, ffn in made.layers.items():
            whole = load_ffn(path, layer, dtype)
            for num_rows in (1, 2, 7, 40):
                rows_RD = torch.randn(num_rows, ffn.shape.hidden_size).to(dtype)
                batch = random_batch(num_rows)
                expected_RD = whole.forward(rows_RD, *batch)
                assert torch.equal(ffn.forward(rows_RD, *batch), expected_RD), (layer, num_rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_bits(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tiny_checkpoint(family, tmp_path)
    for num_slots in (1, 3):
        assert_same_bits(path, dtype, num_slots)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "silu"])
def test_activations_keep_their_bits(act: str, tmp_path: Path) -> None:
    """Their kernels finish the end of a tensor with other instructions than the rest of it."""
    path = tiny_checkpoint("mixtral", tmp_path, hidden_act=act, intermediate_size=52)
    for num_slots in (1, 3, 5):
        assert_same_bits(path, torch.float32, num_slots)


def test_quantised_checkpoints_keep_their_bits(tmp_path: Path) -> None:
    assert_same_bits(fp8_checkpoint(tmp_path / "fp8"), torch.bfloat16, 2)
    assert_same_bits(mxfp4_checkpoint(tmp_path / "mxfp4"), torch.bfloat16, 2)
    assert_same_bits(
        mxfp4_checkpoint(tmp_path / "mxfp4"), torch.float32, 2, host_memory_bytes=1 << 30
    )


@pytest.mark.parametrize("ffn_size", [96, 50])
def test_experts_at_odd_places_of_a_file_keep_their_bits(ffn_size: int, tmp_path: Path) -> None:
    """transformers computes on the mapped file, where an expert may begin at any multiple of 4."""
    path = tiny_checkpoint("mixtral", tmp_path, fused=True, intermediate_size=ffn_size)
    for host_memory_bytes in (0, 1 << 30):
        assert_same_bits(path, torch.float32, 3, host_memory_bytes=host_memory_bytes)


def test_a_slow_link_changes_no_bits(tmp_path: Path) -> None:
    path = tiny_checkpoint("gpt_oss", tmp_path)
    assert_same_bits(path, torch.float32, 3, simulated_load_bytes_per_s=1e8)


def test_several_threads_get_the_bits_of_one(tmp_path: Path) -> None:
    """A batch whose callers have gone may still run when the next one starts."""
    path = tiny_checkpoint("gpt_oss", tmp_path)
    whole = {layer: load_ffn(path, layer, torch.float32) for layer in (0, 1)}
    torch.manual_seed(3)
    calls = [(at % 2, torch.randn(1 + at % 9, 64), random_batch(1 + at % 9)) for at in range(200)]
    with swapped(path, torch.float32, 3) as made, ThreadPoolExecutor(4) as threads:

        def compute(call: tuple[int, torch.Tensor, tuple[list[int], list[int]]]) -> torch.Tensor:
            layer, rows_RD, batch = call
            return made.layers[layer].forward(rows_RD, *batch)

        for (layer, rows_RD, batch), got in zip(calls, threads.map(compute, calls), strict=True):
            assert torch.equal(got, whole[layer].forward(rows_RD, *batch))
