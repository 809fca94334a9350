"""Where weights come from: the checkpoint, copies in host memory, a link that takes its time."""

import time
from math import inf
from pathlib import Path

import pytest
import torch
from tests.checkpoints import tiny_checkpoint

from expertmesh.experts.arena import Arena, slot_plans
from expertmesh.experts.loads import Cancelled, IsCancelled
from expertmesh.experts.reader import ExpertReader
from expertmesh.experts.residency import ExpertKey, Residency
from expertmesh.experts.sources import CheckpointSource, HostCopies, Slowed
from expertmesh.experts.stack import ExpertStack
from expertmesh.runtime.checkpoint import Checkpoint

CPU = torch.device("cpu")
A, B, C = (ExpertKey(0, expert) for expert in range(3))


class Bench:
    """A device with room for everything, and a source that notes what it is asked for."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.reader = ExpertReader(Checkpoint.open(path))
        self.plans = slot_plans(self.reader, {0: tuple(range(8))}, dtype)
        self.device = Arena(self.plans, 1 << 30, dtype, CPU)
        self.dtype = dtype
        self.read: list[ExpertKey] = []
        self._checkpoint = CheckpointSource(self.reader, dtype)

    def fill(self, key: ExpertKey, stack: ExpertStack, is_cancelled: IsCancelled) -> None:
        self.read.append(key)
        self._checkpoint.fill(key, stack, is_cancelled)

    def host_copies(self, number: int) -> HostCopies:
        sizes = {key: plan.num_bytes for key, plan in self.plans.items()}
        budget_bytes = number * max(sizes.values())
        arena = Arena(self.plans, budget_bytes, self.dtype, CPU)
        return HostCopies(Residency(sizes, budget_bytes, inf), arena, self.fill)

    def check(self, key: ExpertKey, stack: ExpertStack) -> None:
        """A slot holds what the checkpoint says."""
        for got, expected in stack.pairs(0, self.reader.load(*key, self.dtype)):
            assert torch.equal(got, expected.to(self.dtype))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tiny_checkpoint("gpt_oss", tmp_path), torch.float32)


def never() -> bool:
    return False


def always() -> bool:
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx"])
def test_slots_hold_what_the_checkpoint_says(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    bench = Bench(tiny_checkpoint(family, tmp_path), dtype)
    copies = bench.host_copies(2)
    for key in (A, B, C, A, B, C):
        stack = bench.device.take(key)
        copies.fill(key, stack, never)
        bench.check(key, stack)


def test_what_host_memory_holds_is_not_read_again(bench: Bench) -> None:
    copies = bench.host_copies(2)
    for key in (A, B, A, B, A):
        copies.fill(key, bench.device.take(key), never)
    assert bench.read == [A, B]


def test_host_memory_keeps_what_is_asked_for_more(bench: Bench) -> None:
    copies = bench.host_copies(1)
    for key in (A, A, B, A):
        copies.fill(key, bench.device.take(key), never)
    assert bench.read == [A, B], "B did not take A's place"
    for _ in range(4):
        copies.fill(C, bench.device.take(C), never)
    assert bench.read == [A, B, C, C, C, C]
    copies.fill(C, bench.device.take(C), never)
    assert bench.read.count(C) == 4, "C took A's place"


def test_a_cancelled_load_leaves_no_half_copy(bench: Bench) -> None:
    copies = bench.host_copies(1)
    with pytest.raises(Cancelled):
        copies.fill(A, bench.device.take(A), always)
    stack = bench.device.take(A)
    copies.fill(A, stack, never)
    bench.check(A, stack)
    assert bench.read == [A, A]
    with pytest.raises(Cancelled):
        copies.fill(A, stack, always)


def test_a_slow_link_takes_its_time_unless_cancelled(bench: Bench) -> None:
    stack = bench.device.take(A)
    slowed = Slowed(bench.fill, stack.memory.nbytes / 0.05)
    started_s = time.monotonic()
    slowed.fill(A, stack, never)
    assert time.monotonic() - started_s >= 0.05
    bench.check(A, stack)
    with pytest.raises(Cancelled):
        slowed.fill(A, stack, lambda: time.monotonic() > started_s + 0.06)
