"""The device's memory for weights under a budget: slots of one expert each, made when needed."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from expertmesh.experts.expert_spec import ExpertSpec
from expertmesh.experts.reader import ExpertReader, ExpertShape
from expertmesh.experts.residency import ExpertKey
from expertmesh.experts.stack import ExpertStack, allocate, stack_bytes

Allocate = Callable[[int, torch.dtype, torch.device], torch.Tensor]
"""Flat memory of so many bytes, or torch's error that there is none."""


@dataclass(frozen=True)
class SlotPlan:
    """What one expert needs of a slot."""

    spec: ExpertSpec
    shape: ExpertShape
    offsets: tuple[int, int]
    """Alignment of its up and down weights: as among all experts of the layer in one stack."""
    num_bytes: int
    """The same for all experts of a shape, so that a slot can take any of them."""


class Arena:
    """Gives and takes back slots. Not thread-safe.

    Args:
        allocate: of memory.
    """

    def __init__(
        self,
        plans: Mapping[ExpertKey, SlotPlan],
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        allocate: Allocate = allocate,
    ) -> None:
        self._plans = plans
        self._budget_bytes = budget_bytes
        self._dtype, self._device = dtype, device
        self._allocate = allocate
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)
        self.allocated_bytes = 0
        """Of slots in use and free; not above the budget, unless that was lowered."""

    def take(self, key: ExpertKey) -> ExpertStack:
        """A slot for one expert, with arbitrary values.

        Raises:
            RuntimeError: the allocation failed (torch.OutOfMemoryError is one).
        """
        plan = self._plans[key]
        free = self._free[plan.num_bytes]
        memory = free.pop() if free else self._new(plan.num_bytes)
        return ExpertStack(plan.spec, plan.shape, 1, memory, plan.offsets)

    def give_back(self, stack: ExpertStack) -> None:
        """The slot may be taken again; nobody may use the stack any more."""
        self._free[stack.memory.nbytes].append(stack.memory)
        self._trim(0)

    def set_budget(self, budget_bytes: int) -> None:
        """Slots in use may be above it for as long as they are."""
        self._budget_bytes = budget_bytes
        self._trim(0)

    def _trim(self, num_bytes: int) -> None:
        """Give free slots back until so many more bytes are within the budget, or none is free."""
        while self.allocated_bytes + num_bytes > self._budget_bytes and self._drop_one():
            pass

    def _new(self, num_bytes: int) -> torch.Tensor:
        self._trim(num_bytes)
        try:
            memory = self._allocate(num_bytes, self._dtype, self._device)
        except RuntimeError:
            if not self._drop_one():
                raise
            return self._new(num_bytes)
        self.allocated_bytes += num_bytes
        return memory

    def _drop_one(self) -> bool:
        """Give a free slot, which is of another size than wanted, back to the device."""
        size = next((size for size, free in self._free.items() if free), 0)
        if size:
            self._free[size].pop()
            self.allocated_bytes -= size
        return bool(size)


def slot_plans(
    reader: ExpertReader, held: Mapping[int, tuple[int, ...]], dtype: torch.dtype
) -> dict[ExpertKey, SlotPlan]:
    """What each expert held needs of a slot.

    Args:
        held: expert ids by layer, ascending.
    """
    needs: dict[ExpertKey, tuple[ExpertShape, tuple[int, int]]] = {}
    sizes: dict[ExpertShape, int] = {}
    for layer, experts in held.items():
        shape = reader.expert_shape(layer)
        up_bytes, down_bytes = _matrix_bytes(shape, dtype)
        at_up, at_down = reader.memory_offsets(layer, dtype)
        for rank, expert in enumerate(experts):
            offsets = (at_up + rank * up_bytes, at_down + rank * down_bytes)
            needs[ExpertKey(layer, expert)] = shape, offsets
            num_bytes = stack_bytes(shape, 1, dtype.itemsize, offsets)
            sizes[shape] = max(num_bytes, sizes.get(shape, 0))
    return {
        key: SlotPlan(reader.spec, shape, offsets, sizes[shape])
        for key, (shape, offsets) in needs.items()
    }


def _matrix_bytes(shape: ExpertShape, dtype: torch.dtype) -> tuple[int, int]:
    down_bytes = shape.hidden_size * shape.ffn_size * dtype.itemsize
    return down_bytes * (2 if shape.gated else 1), down_bytes
