"""The experts one replica holds of one layer, and their forward, bit for bit as transformers' own.

Shapes: R rows, D hidden size, F FFN size, S slots (experts held), O outputs of a product, U what
the first product gives: 2F, or F without a gate.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from expertmesh.experts.expert_spec import Activation, ExpertSpec
from expertmesh.experts.reader import ExpertReader, ExpertShape, ExpertTensors
from expertmesh.experts.stack import CACHE_LINE_BYTES, ExpertStack, allocate, stack_bytes
from expertmesh.runtime.errors import UnknownExpert


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
    """Some experts of one layer, all in memory, and their forward."""

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
        self.experts = tuple(sorted(experts))
        self._slots = {expert: slot for slot, expert in enumerate(self.experts)}
        num_bytes = stack_bytes(shape, len(self.experts), dtype.itemsize, offsets)
        memory = allocate(num_bytes, dtype, device)
        self.stack = ExpertStack(spec, shape, len(self.experts), memory, offsets)

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
    def shape(self) -> ExpertShape:
        """The size of each expert."""
        return self.stack.shape

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights held."""
        return len(self.experts) * self.shape.num_parameters * self.stack.dtype.itemsize

    def fill(self, expert: int, tensors: ExpertTensors) -> None:
        """Copies one expert's weights, cast to this dtype, into its slot."""
        self.stack.fill(self._slots[expert], tensors)

    def tensors(self, expert: int) -> ExpertTensors:
        """One expert's weights, as views of its slot."""
        return self.stack.slot_views(self._slots[expert])

    def forward(
        self, rows_RD: torch.Tensor, experts: Sequence[int], rows_per_expert: Sequence[int]
    ) -> torch.Tensor:
        """The unweighted outputs of rows that lie sorted by expert.

        The same operations in the same order as grouped_mm_experts_forward in
        transformers/integrations/moe.py, without its weights and its sum over slots. All rows of
        an expert go through one product: float32 bits depend on how many rows there are and, with
        several threads, on where a row lies among them (tests/unit/experts/test_ffn.py).

        Not in torch's inference mode: nothing here has a gradient, and to enter and leave it takes
        5 us, as much as a product of one row.

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
        assert sum(rows_per_expert) == rows_RD.shape[0], "rows_per_expert must add up to the rows"
        stack, rows_RD = self.stack, aligned(rows_RD)
        hidden_RU = stack.up(rows_RD, slots, rows_per_expert)
        _add_biases(hidden_RU, stack.up_bias_SU, slots, rows_per_expert)
        hidden_RF = gate(stack.spec, hidden_RU)
        out_RD = stack.down(hidden_RF, slots, rows_per_expert)
        _add_biases(out_RD, stack.down_bias_SD, slots, rows_per_expert)
        return out_RD

    def _slots_of(self, experts: Sequence[int]) -> list[int]:
        try:
            return [self._slots[expert] for expert in experts]
        except KeyError as missing:
            raise UnknownExpert(
                f"expert {missing} is not held here; held: {', '.join(map(str, self.experts))}.",
                expert=missing,
            ) from None


def _add_biases(
    out_RO: torch.Tensor,
    biases_SO: torch.Tensor | None,
    slots: Sequence[int],
    num_rows: Sequence[int],
) -> None:
    if biases_SO is not None:
        slots_X, counts_X = torch.tensor([slots, num_rows], device=out_RO.device).long()
        out_RO.add_(biases_SO[slots_X.repeat_interleave(counts_X)])


def gate(spec: ExpertSpec, hidden_RU: torch.Tensor) -> torch.Tensor:
    """The activation between the products: [R, F]."""
    act = _ACTIVATIONS[spec.act]
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


def add_bias(out_RO: torch.Tensor, bias_1O: torch.Tensor | None) -> None:
    """To the rows of one expert."""
    if bias_1O is not None:
        out_RO.add_(bias_1O)


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """Rows fresh off the wire lie at any address, and float32 bits depend on the alignment."""
    on_cpu = rows.device.type == "cpu"
    return rows.clone() if on_cpu and rows.data_ptr() % CACHE_LINE_BYTES else rows
