"""Modules without weights that stand where a model has its experts, and call them elsewhere.

Shape suffixes: T tokens, D hidden size, E experts, K experts per token, R rows (T * K), P padded
rows, B batch, S sequence length; "N" is any leading shape.
"""

from typing import Any, Protocol

import torch
from torch import nn

from expertmesh.runtime.dense_rows import pad_to_dense
from expertmesh.runtime.errors import UnsupportedCheckpoint
from expertmesh.v1 import router_pb2

_PLAIN_EXPERTS = {"DbrxExperts"}
"""Experts classes with the usual three arguments that transformers does not decorate."""
_LLAMA4_BLOCK = "Llama4TextMoe"
_ROUTING_NAMES = ("top_k_index", "router_indices", "top_k_weights", "routing_weights")
"""Names of the arguments of Experts.forward after the hidden states, ids before weights."""


class ExpertCaller(Protocol):
    """Runs routed experts somewhere: over gRPC, or in this process."""

    def dispatch(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        experts_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        combine: int,
    ) -> torch.Tensor:
        """The weighted sum over each token's experts, [T, D] in the dtype of `hidden_TD`.

        Called from the thread that runs the model; blocks until the answer is there.

        Args:
            layer: index of the decoder layer.
            hidden_TD: what the experts get, in the model's dtype.
            experts_TK: int64 expert ids.
            weights_TK: float32 or the model's dtype.
            combine: `router_pb2.COMBINE_*`, the order of summation.

        Raises:
            ExpertMeshError: no answer; it leaves the model's forward unchanged.
        """
        ...


class RemoteExperts(nn.Module):
    """Takes the place of an Experts module; inference only, as no gradient comes back.

    Args:
        layer: index of the decoder layer.
        num_experts: experts of the replaced module, for `repr` and blocks that ask.
        caller: where the experts are.
        combine: the order in which the replaced module sums.
    """

    def __init__(self, layer: int, num_experts: int, caller: ExpertCaller, combine: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_experts = num_experts
        self.caller = caller
        self.combine = combine

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_ND: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Same shape and dtype as `hidden_ND`; dbrx passes [B, S, D], all others [T, D].

        The other two arguments are experts_TK and weights_TK, which gpt-oss names
        `router_indices` and `routing_weights` and all others `top_k_index` and `top_k_weights`.
        """
        experts_TK, weights_TK = routing_of(*args, **kwargs)
        hidden_TD = hidden_ND.reshape(-1, hidden_ND.shape[-1])
        out_TD = self.caller.dispatch(self.layer, hidden_TD, experts_TK, weights_TK, self.combine)
        return out_TD.reshape(hidden_ND.shape)

    def extra_repr(self) -> str:
        return f"layer={self.layer}, num_experts={self.num_experts}"


class RemoteLlama4Moe(nn.Module):
    """Takes the place of a Llama4TextMoe block, keeping its router and its shared expert.

    transformers multiplies every token by its score for every expert, zero for those not chosen,
    and runs all E experts over all T tokens. Here only the chosen rows leave, scaled before the
    expert, with weights of one. In exact arithmetic the same: an expert maps zeros to zeros.
    """

    def __init__(self, layer: int, block: nn.Module, caller: ExpertCaller) -> None:
        super().__init__()
        self.layer = layer
        self.caller = caller
        self.top_k = int(block.top_k)  # type: ignore[arg-type]
        self.hidden_dim = int(block.hidden_dim)  # type: ignore[arg-type]
        self.num_experts = int(block.num_experts)  # type: ignore[arg-type]
        self.router = block.router
        self.shared_expert = block.shared_expert

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(output [T, D], router logits [T, E]), as Llama4TextMoe returns them."""
        hidden_TD = hidden_ND.reshape(-1, self.hidden_dim)
        scores_TE, logits_TE = self.router(hidden_TD)  # type: ignore[operator]
        experts_TK = logits_TE.topk(self.top_k, dim=1).indices  # as the router chose them
        rows_TKD = hidden_TD.unsqueeze(1) * scores_TE.gather(1, experts_TK).unsqueeze(-1)
        routed_TKD = self._dispatch(rows_TKD.flatten(0, 1), experts_TK).view_as(rows_TKD)
        out_TD: torch.Tensor = self.shared_expert(hidden_TD)  # type: ignore[operator]
        return out_TD.add_(routed_TKD.sum(dim=1)), logits_TE

    def _dispatch(self, rows_RD: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Each row is a token of its own with one expert: rows differ between a token's experts."""
        experts_R = experts_TK.reshape(-1)
        padded_PD, experts_P = pad_to_dense(rows_RD, experts_R, len(experts_TK))
        weights_P1 = torch.ones_like(experts_P, dtype=rows_RD.dtype).unsqueeze(1)
        out_PD = self.caller.dispatch(
            self.layer, padded_PD, experts_P.unsqueeze(1), weights_P1, router_pb2.COMBINE_SLOT_SUM
        )
        return out_PD[: len(rows_RD)]

    def extra_repr(self) -> str:
        return f"layer={self.layer}, num_experts={self.num_experts}"


def routing_of(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(experts_TK, weights_TK) from the arguments after the hidden states of Experts.forward."""
    named = [kwargs[name] for name in _ROUTING_NAMES if name in kwargs]
    experts_TK, weights_TK = [*args, *named]
    return experts_TK, weights_TK


def is_decorated(module: nn.Module) -> bool:
    """Whether transformers' `@use_experts_implementation` made this class: it sets these two."""
    return hasattr(module, "is_concatenated") and hasattr(module, "has_gate")


def is_experts(module: nn.Module) -> bool:
    """Whether `remote` can replace this module. For llama4 it is the whole MoE block: its experts
    get dense inputs, so what was chosen is only known one level up."""
    return is_decorated(module) or type(module).__name__ in {*_PLAIN_EXPERTS, _LLAMA4_BLOCK}


def layer_of(module_name: str) -> int:
    """`model.layers.3.mlp.experts` -> 3.

    Raises:
        UnsupportedCheckpoint: no number in the name.
    """
    for part in reversed(module_name.split(".")):
        if part.isdigit():
            return int(part)
    raise UnsupportedCheckpoint(
        f"experts at {module_name!r} belong to no numbered layer", module=module_name
    )


def combine_of(module: nn.Module) -> int:
    """The order in which this Experts module sums: in slot order, except for eager loops.

    dbrx has no other implementation than its own loop.
    """
    config = getattr(module, "config", None)
    eager = getattr(config, "_experts_implementation", None) == "eager"
    if eager or type(module).__name__ in _PLAIN_EXPERTS:
        return router_pb2.COMBINE_EAGER
    return router_pb2.COMBINE_SLOT_SUM


def remote(module_name: str, module: nn.Module, caller: ExpertCaller) -> nn.Module:
    """The replacement of a module for which `is_experts` holds."""
    layer = layer_of(module_name)
    if type(module).__name__ == _LLAMA4_BLOCK:
        return RemoteLlama4Moe(layer, module, caller)
    num_experts = int(module.num_experts)  # type: ignore[arg-type]
    return RemoteExperts(layer, num_experts, caller, combine_of(module))


def swap_experts(model: nn.Module, caller: ExpertCaller) -> list[int]:
    """Replaces every Experts module of `model` in place and returns their layers, ascending.

    Raises:
        UnsupportedCheckpoint: the model has none, so it is dense or of an unknown family.
    """
    found = [(name, module) for name, module in model.named_modules() if is_experts(module)]
    if not found:
        raise UnsupportedCheckpoint(
            f"{type(model).__name__} has no experts that can be called remotely; "
            "expected a Mixture-of-Experts model as `expertmesh inspect` lists them",
            model=type(model).__name__,
        )
    for name, module in found:
        model.set_submodule(name, remote(name, module, caller))
    return sorted(layer_of(name) for name, _ in found)
