"""The experts of one layer when the device cannot hold them all: computed as their weights come.

Shapes: R rows, D hidden size, F FFN size, U what the first product gives: 2F, or F without a gate.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch

from expertmesh.experts.expert_spec import ExpertSpec
from expertmesh.experts.ffn import add_bias, aligned, gate
from expertmesh.experts.loader import ExpertLoader
from expertmesh.experts.reader import ExpertShape
from expertmesh.experts.residency import ExpertKey
from expertmesh.experts.stack import ExpertStack

Likely = Callable[[int, Sequence[int], torch.Tensor], Sequence[ExpertKey]]
"""(layer, its experts, rows_RD) -> experts that will probably be needed next."""


class SwappedFFN:
    """As `ExpertFFN`, bit for bit, with weights that the loader brings.

    Args:
        likely: told each batch as it begins.
    """

    def __init__(
        self,
        layer: int,
        spec: ExpertSpec,
        shape: ExpertShape,
        loader: ExpertLoader,
        likely: Likely,
    ) -> None:
        self.shape = shape
        self._layer, self._spec = layer, spec
        self._loader, self._likely = loader, likely

    @torch.inference_mode()
    def forward(
        self, rows_RD: torch.Tensor, experts: Sequence[int], rows_per_expert: Sequence[int]
    ) -> torch.Tensor:
        """As `ExpertFFN.forward`.

        Raises:
            WeightsUnavailable: some expert's could not be loaded.
        """
        rows_RD = aligned(rows_RD)
        spans = _spans(experts, rows_per_expert)
        num_up = self.shape.ffn_size * (2 if self.shape.gated else 1)
        hidden_RU = rows_RD.new_zeros(len(rows_RD), num_up)
        out_RD = torch.empty_like(rows_RD)
        keys = [ExpertKey(self._layer, expert) for expert in experts]
        for stacks in self._loader.use(keys, self._likely(self._layer, experts, rows_RD)):
            self._compute(rows_RD, hidden_RU, out_RD, stacks, spans)
            if rows_RD.is_cuda:  # kernels read the weights until they have run
                torch.cuda.current_stream(rows_RD.device).synchronize()
        return out_RD

    def _compute(
        self,
        rows_RD: torch.Tensor,
        hidden_RU: torch.Tensor,
        out_RD: torch.Tensor,
        stacks: Mapping[ExpertKey, ExpertStack],
        spans: Mapping[int, slice],
    ) -> None:
        """The outputs of the experts that are there, into their rows of `out_RD`."""
        there = [(stack, spans[key.expert]) for key, stack in stacks.items()]
        for stack, span in there:
            torch.mm(rows_RD[span], stack.each_up_DU[0], out=hidden_RU[span])
            add_bias(hidden_RU[span], stack.up_bias_SU)
        # over all rows, missing ones too: an element's bits depend on where in the tensor it lies,
        # because the vectorised kernels finish the ends of loops with other instructions
        hidden_RF = gate(self._spec, hidden_RU)
        for stack, span in there:
            torch.mm(hidden_RF[span], stack.each_down_FD[0], out=out_RD[span])
            add_bias(out_RD[span], stack.down_bias_SD)


def _spans(experts: Sequence[int], rows_per_expert: Sequence[int]) -> dict[int, slice]:
    """The rows of each expert."""
    stops = list(accumulate(rows_per_expert))
    return {
        expert: slice(stop - count, stop)
        for expert, stop, count in zip(experts, stops, rows_per_expert, strict=True)
    }
