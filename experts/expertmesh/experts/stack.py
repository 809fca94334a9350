"""Memory for the weights of S experts of one shape, stacked as transformers stacks them.

Shapes: D hidden size, F FFN size, S slots, one expert each, R rows, I and O inputs and outputs of a
product, U what the first product gives: 2F, or F without a gate.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional

from expertmesh.experts.expert_spec import ExpertSpec
from expertmesh.experts.reader import ExpertShape, ExpertTensors, split_gate_up

_ALIGNMENT_BYTES = 16  # grouped_mm takes no other row strides
CACHE_LINE_BYTES = 64
_MIN_CAPABILITY = (8, 0)


class ExpertStack:
    """The weights of S experts and their two products.

    The memory layout (transposed, interleaved, alignment) is transformers' because the bits of a
    float32 product depend on it.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        shape: ExpertShape,
        num_slots: int,
        memory: torch.Tensor,
        offsets: tuple[int, int] = (0, 0),
    ) -> None:
        """Views of `memory`; `fill` gives them values.

        Args:
            memory: flat, at least `stack_bytes` long, in the dtype and on the device to compute in.
            offsets: `ExpertReader.memory_offsets`.
        """
        self.spec, self.shape, self.num_slots = spec, shape, num_slots
        self.memory, self.dtype, self.device = memory, memory.dtype, memory.device
        up, down, *biases = _carve(memory, shape, num_slots, offsets)
        self.up_SUD = _matrices(up, _num_up(shape), shape.hidden_size, spec.gate_up_transposed)
        self.down_SDF = _matrices(down, shape.hidden_size, shape.ffn_size, spec.down_transposed)
        up_bias_SU, down_bias_SD = (
            (b.view(num_slots, -1) for b in biases) if biases else (None, None)
        )
        self.up_bias_SU: torch.Tensor | None = up_bias_SU
        self.down_bias_SD: torch.Tensor | None = down_bias_SD
        self.grouped = _has_grouped_mm(self.device, shape, self.dtype)
        """Whether products run as one torch grouped_mm kernel, or expert after expert."""
        # made once: views cost as much as the product of one row
        self.up_SDU = self.up_SUD.transpose(-2, -1)
        self.down_SFD = self.down_SDF.transpose(-2, -1)
        self.each_up_DU, self.each_down_FD = self.up_SDU.unbind(), self.down_SFD.unbind()

    def up(
        self, rows_RD: torch.Tensor, slots: Sequence[int], num_rows: Sequence[int]
    ) -> torch.Tensor:
        """The first product of rows that lie sorted by slot: [R, U]."""
        if self.grouped:
            return grouped_product(rows_RD, self.up_SDU, slots, num_rows)
        return looped_product(rows_RD, self.each_up_DU, slots, num_rows)

    def down(
        self, hidden_RF: torch.Tensor, slots: Sequence[int], num_rows: Sequence[int]
    ) -> torch.Tensor:
        """The second: [R, D]."""
        if self.grouped:
            return grouped_product(hidden_RF, self.down_SFD, slots, num_rows)
        return looped_product(hidden_RF, self.each_down_FD, slots, num_rows)

    def fill(self, slot: int, tensors: ExpertTensors) -> None:
        """Copies one expert's weights, cast to this dtype, into a slot."""
        for target, values in self.pairs(slot, tensors):
            target.copy_(values)

    def pairs(
        self, slot: int, tensors: ExpertTensors
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What belongs where when a slot is filled."""
        views, given = self.slot_views(slot).named(), tensors.named()
        assert views.keys() == given.keys(), (views.keys(), given.keys())
        return ((target, given[name]) for name, target in views.items())

    def slot_views(self, slot: int) -> ExpertTensors:
        """A slot's weights as [out, in] views of the stacked memory."""
        gated, interleaved = self.shape.gated, self.spec.interleaved
        up, bias = self.up_SUD[slot], self.up_bias_SU
        gate, up = split_gate_up(up, interleaved) if gated else (None, up)
        if bias is None or self.down_bias_SD is None:
            return ExpertTensors(up=up, down=self.down_SDF[slot], gate=gate)
        gate_bias, up_bias = split_gate_up(bias[slot], interleaved) if gated else (None, bias[slot])
        down, down_bias = self.down_SDF[slot], self.down_bias_SD[slot]
        return ExpertTensors(up, down, gate, gate_bias, up_bias, down_bias)


def stack_bytes(
    shape: ExpertShape, num_slots: int, item_bytes: int, offsets: tuple[int, int] = (0, 0)
) -> int:
    """Bytes of the memory of a stack: its weights, and what aligning them takes."""
    stop = 0
    for size, offset in zip(_sizes(shape, num_slots), (*offsets, 0, 0), strict=False):
        stop += _skip(stop, offset, item_bytes) + size * item_bytes
    return stop


def allocate(num_bytes: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Flat memory for a stack; torch's begins at a cache line on every device."""
    return torch.empty(-(-num_bytes // dtype.itemsize), dtype=dtype, device=device)


def allocate_on_host(
    pinned: bool,
) -> Callable[[int, torch.dtype, torch.device | str], torch.Tensor]:
    """As `allocate`, in memory that a GPU copies from while others compute if it is pinned."""

    def on_host(num_bytes: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        memory = allocate(num_bytes, dtype, device)
        return memory.pin_memory() if pinned else memory

    return on_host


def _num_up(shape: ExpertShape) -> int:
    return shape.ffn_size * (2 if shape.gated else 1)


def _sizes(shape: ExpertShape, num_slots: int) -> list[int]:
    """Elements of the weights up and down, and of the biases up and down if there are any."""
    num_up, num_in, num_hidden = _num_up(shape), shape.hidden_size, shape.ffn_size
    sizes = [num_up * num_in, num_in * num_hidden, *((num_up, num_in) if shape.biased else ())]
    return [num_slots * size for size in sizes]


def _skip(address: int, offset_bytes: int, item_bytes: int) -> int:
    """Bytes to leave free so that what follows lies as in a file where it begins at the offset."""
    return (offset_bytes - address) % CACHE_LINE_BYTES // item_bytes * item_bytes


def _carve(
    memory: torch.Tensor, shape: ExpertShape, num_slots: int, offsets: tuple[int, int]
) -> list[torch.Tensor]:
    parts, at = [], 0
    for size, offset in zip(_sizes(shape, num_slots), (*offsets, 0, 0), strict=False):
        address = memory.data_ptr() + at * memory.itemsize
        at += _skip(address, offset, memory.itemsize) // memory.itemsize
        parts.append(memory[at : at + size])
        at += size
    return parts


def _matrices(part: torch.Tensor, num_out: int, num_in: int, transposed: bool) -> torch.Tensor:
    """[S, out, in], which is a view of [S, in, out] if transposed."""
    if transposed:
        return part.view(-1, num_in, num_out).transpose(-2, -1)
    return part.view(-1, num_out, num_in)


def grouped_product(
    rows_RI: torch.Tensor, weights_SIO: torch.Tensor, slots: Sequence[int], num_rows: Sequence[int]
) -> torch.Tensor:
    """Each slot's rows times its matrix, in one kernel. Runs on CPUs too, with equal bits."""
    counts_S = torch.zeros(len(weights_SIO), dtype=torch.int32)
    counts_S[list(slots)] = torch.tensor(num_rows, dtype=torch.int32)
    offsets_S = counts_S.cumsum(0, dtype=torch.int32).to(weights_SIO.device)
    return functional.grouped_mm(rows_RI, weights_SIO, offs=offsets_S)


def looped_product(
    rows_RI: torch.Tensor,
    each_IO: Sequence[torch.Tensor],
    slots: Sequence[int],
    num_rows: Sequence[int],
) -> torch.Tensor:
    """Each slot's rows times its matrix, one product after another.

    It is what grouped_mm does on a CPU, but pays nothing for slots without rows: with 4 of 64
    active, 48 us instead of 150 (128 x 256, float32, one thread).
    """
    if len(slots) == 1:  # a decode step: nothing to slice
        return torch.mm(rows_RI, each_IO[slots[0]])
    out_RO = rows_RI.new_empty(len(rows_RI), each_IO[0].shape[-1])
    start = 0
    for slot, count in zip(slots, num_rows, strict=True):
        stop = start + count
        torch.mm(rows_RI[start:stop], each_IO[slot], out=out_RO[start:stop])
        start = stop
    return out_RO


def _has_grouped_mm(device: torch.device, shape: ExpertShape, dtype: torch.dtype) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return False
    strides = (shape.hidden_size, shape.ffn_size)
    return all(stride * dtype.itemsize % _ALIGNMENT_BYTES == 0 for stride in strides)
