"""A loader whose source is slow enough to be caught halfway, and who checks what it hands out."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from expertmesh.experts.arena import Arena, SlotPlan
from expertmesh.experts.expert_spec import ExpertSpec
from expertmesh.experts.loader import ExpertLoader
from expertmesh.experts.loads import Cancelled, IsCancelled
from expertmesh.experts.reader import ExpertShape
from expertmesh.experts.residency import ExpertKey, Residency
from expertmesh.experts.stack import ExpertStack, allocate, stack_bytes
from expertmesh.runtime.errors import DamagedShard

SPEC = ExpertSpec.from_config({"model_type": "mixtral"})
SHAPE = ExpertShape(hidden_size=16, ffn_size=8, gated=True, biased=False)
WIDE = ExpertShape(hidden_size=16, ffn_size=24, gated=True, biased=False)
SLOT_BYTES = stack_bytes(SHAPE, 1, 4)
KEYS = [ExpertKey(layer, expert) for layer in range(2) for expert in range(4)]
A, B, C, D = KEYS[:4]
TIMEOUT_S = 10.0


def value_of(key: ExpertKey) -> float:
    """What every weight of an expert is."""
    return 1.0 + key.layer * 4 + key.expert


class Source:
    """Fills slots slowly enough to be caught in between; stops and fails when told to."""

    def __init__(self) -> None:
        self.filled: list[ExpertKey] = []
        self.broken: set[ExpertKey] = set()
        self.gates: dict[ExpertKey, threading.Event] = {}
        self.begun: dict[ExpertKey, threading.Event] = {key: threading.Event() for key in KEYS}

    def close(self, key: ExpertKey) -> threading.Event:
        """Loads of this expert stop halfway until the event is set."""
        return self.gates.setdefault(key, threading.Event())

    def fill(self, key: ExpertKey, stack: ExpertStack, is_cancelled: IsCancelled) -> None:
        half = stack.memory.numel() // 2
        stack.memory[:half].fill_(value_of(key))
        self.begun[key].set()
        deadline_s = time.monotonic() + TIMEOUT_S
        while key in self.gates and not self.gates[key].wait(0.001):
            assert time.monotonic() < deadline_s
            if is_cancelled():
                raise Cancelled
        if key in self.broken:
            raise DamagedShard("cut off.")
        stack.memory[half:].fill_(value_of(key))
        self.filled.append(key)


def plans(shapes: dict[ExpertKey, ExpertShape]) -> dict[ExpertKey, SlotPlan]:
    return {k: SlotPlan(SPEC, s, (0, 0), stack_bytes(s, 1, 4)) for k, s in shapes.items()}


@contextmanager
def loading(
    num_slots: int,
    source: Source | None = None,
    shapes: dict[ExpertKey, ExpertShape] | None = None,
    allocate: Callable[[int, torch.dtype, torch.device], torch.Tensor] = allocate,
) -> Iterator[ExpertLoader]:
    """A running loader for KEYS on a device with memory for a few of them."""
    own = plans(shapes or dict.fromkeys(KEYS, SHAPE))
    sizes = {key: plan.num_bytes for key, plan in own.items()}
    device, budget_bytes = torch.device("cpu"), num_slots * SLOT_BYTES
    arena = Arena(own, budget_bytes, torch.float32, device, allocate)
    loader = ExpertLoader(Residency(sizes, budget_bytes), arena, (source or Source()).fill, device)
    loader.start()
    try:
        yield loader
        with loader.locked() as residency:
            assert residency.used_bytes <= budget_bytes
            assert not residency.pinned, "everything was unpinned"
            assert arena.allocated_bytes <= budget_bytes
    finally:
        loader.close()


def read(loader: ExpertLoader, keys: Sequence[ExpertKey]) -> list[list[ExpertKey]]:
    """Use experts and check that all their weights are theirs. Returns the portions."""
    portions = []
    for stacks in loader.use(keys):
        for key, stack in stacks.items():
            assert bool((stack.memory == value_of(key)).all()), f"torn weights of {key}"
        portions.append(sorted(stacks))
    assert sorted(key for portion in portions for key in portion) == sorted(keys)
    return portions


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "never"
        time.sleep(0.001)
