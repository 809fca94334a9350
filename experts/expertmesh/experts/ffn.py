"""The experts one replica holds of one layer, and their forward, bit for bit as transformers' own.

Shapes: R rows, D hidden size, F FFN size, S slots (experts held), I and O inputs and outputs of a
product, U what the first product gives: 2F, or F without a gate, X experts of one call.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from expertmesh.experts.expert_spec import Activation, ExpertSpec
from expertmesh.experts.reader import ExpertReader, ExpertShape, ExpertTensors, split_gate_up
from expertmesh.runtime.errors import UnknownExpert

_ALIGNMENT_BYTES = 16  # grouped_mm takes no other row strides
_CACHE_LINE_BYTES = 64
_MIN_CAPABILITY = (8, 0)


def _gelu_tanh(rows: torch.Tensor) -> torch.Tensor:
    return functional.gelu(rows, approximate="tanh")


def _relu2(rows: torch.Tensor) -> torch.Tensor:
    return torch.square(functional.relu(rows))


_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": functional.relu,
    "relu2": _relu2,
}


class ExpertFFN:
    """Weights of some experts of one layer, stacked as transformers stacks them, and their forward.

    The memory layout (transposed, interleaved, alignment) is transformers' because the bits of a
    float32 product depend on it.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        shape: ExpertShape,
        experts: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        offsets: tuple[int, int] = (0, 0),
    ) -> None:
        """Allocates; `load` also fills.

        Args:
            experts: ids of the experts held, distinct.
            offsets: `ExpertReader.memory_offsets`.
        """
        self.spec, self.shape = spec, shape
        self.dtype, self.device = dtype, torch.device(device)
        self.experts = tuple(sorted(experts))
        self._slots = {expert: slot for slot, expert in enumerate(self.experts)}
        num_up = shape.ffn_size * (2 if shape.gated else 1)
        at_up, at_down = offsets
        self._up_SUD = self._weights(num_up, shape.hidden_size, spec.gate_up_transposed, at_up)
        self._down_SDF = self._weights(
            shape.hidden_size, shape.ffn_size, spec.down_transposed, at_down
        )
        self._up_bias_SU = self._biases(num_up)
        self._down_bias_SD = self._biases(shape.hidden_size)
        self.grouped = _has_grouped_mm(self.device, shape, dtype)
        """Whether products run as one torch grouped_mm kernel, or expert after expert."""

    @classmethod
    def load(
        cls,
        reader: ExpertReader,
        layer: int,
        experts: Sequence[int],
        spec: ExpertSpec,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> "ExpertFFN":
        """Reads the experts of one layer into memory of their own.

        Raises:
            UnknownExpert: a layer or an expert that the checkpoint has not.
        """
        offsets = reader.memory_offsets(layer, dtype)
        ffn = cls(spec, reader.expert_shape(layer), experts, dtype, device, offsets)
        for expert in ffn.experts:
            ffn.fill(expert, reader.load(layer, expert, dtype))
        return ffn

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights held."""
        return len(self.experts) * self.shape.num_parameters * self.dtype.itemsize

    def fill(self, expert: int, tensors: ExpertTensors) -> None:
        """Copies one expert's weights, cast to this dtype, into its slot."""
        slot = self.slot_views(expert).named()
        given = tensors.named()
        assert slot.keys() == given.keys(), (slot.keys(), given.keys())
        for name, target in slot.items():
            target.copy_(given[name])

    def slot_views(self, expert: int) -> ExpertTensors:
        """One held expert's weights as [out, in] views of the stacked memory."""
        slot = self._slots[expert]
        gated, interleaved = self.shape.gated, self.spec.interleaved
        up, bias = self._up_SUD[slot], self._up_bias_SU
        gate, up = split_gate_up(up, interleaved) if gated else (None, up)
        if bias is None or self._down_bias_SD is None:
            return ExpertTensors(up=up, down=self._down_SDF[slot], gate=gate)
        gate_bias, up_bias = split_gate_up(bias[slot], interleaved) if gated else (None, bias[slot])
        down, down_bias = self._down_SDF[slot], self._down_bias_SD[slot]
        return ExpertTensors(up, down, gate, gate_bias, up_bias, down_bias)

    @torch.inference_mode()
    def forward(
        self, rows_RD: torch.Tensor, experts: Sequence[int], rows_per_expert: Sequence[int]
    ) -> torch.Tensor:
        """The unweighted outputs of rows that lie sorted by expert.

        The same operations in the same order as grouped_mm_experts_forward in
        transformers/integrations/moe.py, without its weights and its sum over slots. All rows of
        an expert go through one product: float32 bits depend on how many rows there are and, with
        several threads, on where a row lies among them (tests/unit/experts/test_ffn.py).

        Args:
            rows_RD: on this device, in this dtype.
            experts: ids, ascending and distinct.
            rows_per_expert: rows of each, adding up to R.

        Returns:
            [R, D], in the order of `rows_RD`.

        Raises:
            UnknownExpert: an expert that is not held here.
        """
        slots = self._slots_of(experts)
        assert slots == sorted(set(slots)), "experts must be ascending and distinct"
        assert sum(rows_per_expert) == len(rows_RD), "rows_per_expert must add up to the rows"
        rows_RD = _aligned(rows_RD)
        hidden_RU = self._linear(rows_RD, self._up_SUD, self._up_bias_SU, slots, rows_per_expert)
        return self._linear(
            self._gate(hidden_RU), self._down_SDF, self._down_bias_SD, slots, rows_per_expert
        )

    def _slots_of(self, experts: Sequence[int]) -> list[int]:
        try:
            return [self._slots[expert] for expert in experts]
        except KeyError as missing:
            raise UnknownExpert(
                f"expert {missing} is not held here; held: {', '.join(map(str, self.experts))}.",
                expert=missing,
            ) from None

    def _linear(
        self,
        rows_RI: torch.Tensor,
        weights_SOI: torch.Tensor,
        biases_SO: torch.Tensor | None,
        slots: Sequence[int],
        num_rows: Sequence[int],
    ) -> torch.Tensor:
        multiply = grouped_product if self.grouped else looped_product
        out_RO = multiply(rows_RI, weights_SOI.transpose(-2, -1), slots, num_rows)
        if biases_SO is not None:
            slots_X, counts_X = torch.tensor([slots, num_rows], device=self.device).long()
            out_RO.add_(biases_SO[slots_X.repeat_interleave(counts_X)])
        return out_RO

    def _gate(self, hidden_RU: torch.Tensor) -> torch.Tensor:
        """The activation between the products: [R, F]."""
        spec, act = self.spec, _ACTIVATIONS[self.spec.act]
        if spec.gate == "none":
            return act(hidden_RU)
        if spec.interleaved:
            gate_RF, up_RF = hidden_RU[..., ::2], hidden_RU[..., 1::2]
        else:
            gate_RF, up_RF = hidden_RU.chunk(2, dim=-1)
        if spec.gate == "glu":
            return act(gate_RF) * up_RF
        gate_RF = gate_RF.clamp(max=spec.limit)
        up_RF = up_RF.clamp(min=-spec.limit, max=spec.limit)
        if spec.gate == "clamped_glu":
            return act(gate_RF) * up_RF
        return (up_RF + 1) * (gate_RF * torch.sigmoid(gate_RF * spec.alpha))

    def _weights(
        self, num_out: int, num_in: int, transposed: bool, offset_bytes: int
    ) -> torch.Tensor:
        """[S, out, in], which is a view of [S, in, out] if transposed."""
        sizes = (num_in, num_out) if transposed else (num_out, num_in)
        sizes_S = (len(self.experts), *sizes)
        spare = _CACHE_LINE_BYTES // self.dtype.itemsize
        memory = torch.empty(math.prod(sizes_S) + spare, dtype=self.dtype, device=self.device)
        skip = (offset_bytes - memory.data_ptr()) % _CACHE_LINE_BYTES // self.dtype.itemsize
        weights = memory[skip : skip + math.prod(sizes_S)].view(sizes_S)
        return weights.transpose(-2, -1) if transposed else weights

    def _biases(self, num_out: int) -> torch.Tensor | None:
        if not self.shape.biased:
            return None
        return torch.empty(len(self.experts), num_out, dtype=self.dtype, device=self.device)


def grouped_product(
    rows_RI: torch.Tensor, weights_SIO: torch.Tensor, slots: Sequence[int], num_rows: Sequence[int]
) -> torch.Tensor:
    """Each slot's rows times its matrix, in one kernel. Runs on CPUs too, with equal bits."""
    counts_S = torch.zeros(len(weights_SIO), dtype=torch.int32)
    counts_S[list(slots)] = torch.tensor(num_rows, dtype=torch.int32)
    offsets_S = counts_S.cumsum(0, dtype=torch.int32).to(weights_SIO.device)
    return functional.grouped_mm(rows_RI, weights_SIO, offs=offsets_S)


def looped_product(
    rows_RI: torch.Tensor, weights_SIO: torch.Tensor, slots: Sequence[int], num_rows: Sequence[int]
) -> torch.Tensor:
    """Each slot's rows times its matrix, one product after another.

    It is what grouped_mm does on a CPU, but pays nothing for slots without rows: with 4 of 64
    active, 48 us instead of 150 (128 x 256, float32, one thread).
    """
    if len(slots) == 1:  # a decode step: nothing to slice
        return torch.mm(rows_RI, weights_SIO[slots[0]])
    out_RO = rows_RI.new_empty(len(rows_RI), weights_SIO.shape[-1])
    start = 0
    for slot, count in zip(slots, num_rows, strict=True):
        stop = start + count
        torch.mm(rows_RI[start:stop], weights_SIO[slot], out=out_RO[start:stop])
        start = stop
    return out_RO


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """Rows fresh off the wire lie at any address, and float32 bits depend on the alignment."""
    on_cpu = rows.device.type == "cpu"
    return rows.clone() if on_cpu and rows.data_ptr() % _CACHE_LINE_BYTES else rows


def _has_grouped_mm(device: torch.device, shape: ExpertShape, dtype: torch.dtype) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return False
    strides = (shape.hidden_size, shape.ffn_size)
    return all(stride * dtype.itemsize % _ALIGNMENT_BYTES == 0 for stride in strides)
