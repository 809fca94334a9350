"""The experts of a checkpoint in this process: what a layer costs without a mesh.

T tokens, D hidden size, K experts per token, S rows (T * K), X experts hit.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from expertmesh.experts.expert_spec import ExpertSpec
from expertmesh.experts.ffn import ExpertFFN
from expertmesh.experts.reader import ExpertReader
from expertmesh.router.combine import combine
from expertmesh.runtime.checkpoint import Checkpoint


class InPlaceLayer:
    """Layer 0 of a checkpoint, all its experts.

    Args:
        grouped: transformers' default, one grouped_mm for all experts; else one product after
            another.
    """

    def __init__(self, path: Path, *, grouped: bool = False) -> None:
        checkpoint = Checkpoint.open(path)
        reader = ExpertReader(checkpoint)
        spec = ExpertSpec.from_config(checkpoint.config)
        experts = range(reader.num_experts(0))
        self._ffn = ExpertFFN.load(reader, 0, experts, spec, torch.float32)
        self._ffn.stack.grouped = grouped

    def dispatch(
        self, hidden_TD: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """As `ExpertCaller.dispatch`: [T, D]."""
        top_k = experts_TK.shape[1]
        sorted_S, order_S = torch.sort(experts_TK.reshape(-1))
        experts_X, counts_X = torch.unique_consecutive(sorted_S, return_counts=True)
        rows_SD = hidden_TD[order_S // top_k]
        outputs_SD = self._ffn.forward(rows_SD, experts_X.tolist(), counts_X.tolist())
        outputs_TKD = torch.empty_like(outputs_SD)
        outputs_TKD[order_S] = outputs_SD
        outputs_TKD = outputs_TKD.view(*experts_TK.shape, -1)
        return combine(outputs_TKD, weights_TK, experts_TK, "slot_sum", hidden_TD.dtype)


def with_threads(call: Callable[[], object], threads: int) -> Callable[[], object]:
    """The call with torch's number of threads set, as other contestants share the process."""

    def run() -> object:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return call()

    return run
