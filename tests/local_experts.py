"""An ExpertCaller that runs the Experts modules of a complete transformers model in this process.

Shape suffixes: T tokens, D hidden size, K experts per token.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from expertmesh.client.remote_experts import is_decorated, is_experts, layer_of
from expertmesh.v1 import router_pb2


@dataclass(frozen=True)
class Call:
    """What one dispatch was asked."""

    layer: int
    num_tokens: int
    combine: int


@dataclass
class LocalExperts:
    """Answers as transformers would, but raises `errors[n]` at its nth call (from 0)."""

    layers: dict[int, nn.Module]
    calls: list[Call] = field(default_factory=list)
    errors: dict[int, Exception] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> "LocalExperts":
        """The experts of `model`, which keeps them."""
        found = {layer_of(name): m for name, m in model.named_modules() if is_experts(m)}
        return cls(found)

    def dispatch(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        experts_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        combine: int,
    ) -> torch.Tensor:
        self.calls.append(Call(layer, hidden_TD.shape[0], combine))
        error = self.errors.get(len(self.calls) - 1)
        if error is not None:
            raise error
        with torch.inference_mode():
            out_TD = self._run(self.layers[layer], hidden_TD, experts_TK, weights_TK, combine)
        answer_TD: torch.Tensor = out_TD.clone()
        return answer_TD

    def _run(
        self, module: Any, hidden_TD: Any, experts_TK: Any, weights_TK: Any, combine: int
    ) -> Any:
        if is_decorated(module):
            eager = combine == router_pb2.COMBINE_EAGER
            forward = (
                type(module).forward.__wrapped__ if eager else ALL_EXPERTS_FUNCTIONS["grouped_mm"]
            )
            return forward(module, hidden_TD, experts_TK, weights_TK)
        if type(module).__name__ == "DbrxExperts":
            return module(hidden_TD.unsqueeze(0), experts_TK, weights_TK)[0]
        return _llama4(module.experts, hidden_TD, experts_TK[:, 0])


def _llama4(experts: Any, hidden_TD: torch.Tensor, experts_T: torch.Tensor) -> torch.Tensor:
    out_TD = torch.empty_like(hidden_TD)
    for expert in set(experts_T.tolist()):
        rows = experts_T == expert
        gate, up = (hidden_TD[rows] @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
        out_TD[rows] = (up * experts.act_fn(gate)) @ experts.down_proj[expert]
    return out_TD
