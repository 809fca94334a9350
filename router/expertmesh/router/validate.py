"""Checks of a routed call: every wrong tensor has its typed error. T tokens, D hidden, K top-k."""

from collections.abc import Mapping

import torch

from expertmesh.runtime.errors import InvalidInput, NonFiniteInput, UnknownExpert
from expertmesh.runtime.tensors import dtype_name

MAX_TOP_K = 16
_FEW_IDS = 64
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_routing(
    layer: int,
    hidden_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    num_experts: Mapping[int, int],
) -> None:
    """Raises InvalidInput or UnknownExpert naming what is wrong."""
    check_hidden(layer, hidden_TD, num_experts)
    num_tokens = hidden_TD.shape[0]
    if experts_TK.dim() != 2 or experts_TK.shape[0] != num_tokens:
        expected = f"[{num_tokens}, K], one row per row of hidden"
        raise InvalidInput.of("experts.shape", expected=expected, got=list(experts_TK.shape))
    if not 1 <= experts_TK.shape[1] <= MAX_TOP_K:
        expected = f"1 to {MAX_TOP_K} experts per token"
        raise InvalidInput.of("experts.shape", expected=expected, got=experts_TK.shape[1])
    if experts_TK.dtype not in (torch.int64, torch.int32):
        name = dtype_name(experts_TK.dtype)
        raise InvalidInput.of("experts.dtype", expected="int64 or int32", got=name)
    if weights_TK.shape != experts_TK.shape:
        expected = f"{list(experts_TK.shape)}, the shape of experts"
        raise InvalidInput.of("weights.shape", expected=expected, got=list(weights_TK.shape))
    if weights_TK.dtype not in _FLOATS:
        name = dtype_name(weights_TK.dtype)
        raise InvalidInput.of("weights.dtype", expected="a floating-point dtype", got=name)
    _check_ids(layer, experts_TK, num_experts[layer])


def check_hidden(layer: int, hidden_TD: torch.Tensor, num_experts: Mapping[int, int]) -> None:
    """The checks of `Forward`, which has no routing yet."""
    if layer not in num_experts:
        known = ", ".join(map(str, sorted(num_experts)))
        raise UnknownExpert(f"layer {layer}: the model's MoE layers are {known}", layer=layer)
    if hidden_TD.dim() != 2 or not hidden_TD.shape[0]:
        shape = list(hidden_TD.shape)
        raise InvalidInput.of("hidden.shape", expected="[T, D] with T at least 1", got=shape)
    if hidden_TD.dtype not in _FLOATS:
        got = dtype_name(hidden_TD.dtype)
        raise InvalidInput.of("hidden.dtype", expected="a floating-point dtype", got=got)


def check_finite(tensor: torch.Tensor, field: str) -> None:
    """Raises NonFiniteInput naming the first row with NaN or infinity."""
    # its shape may not have been checked yet
    rows = tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(1, -1)
    bad_T = ~torch.isfinite(rows).all(-1)
    if bool(bad_T.any()):
        row = int(bad_T.nonzero()[0])
        raise NonFiniteInput(f"{field}: row {row} holds NaN or infinity", field=field, row=row)


def _check_ids(layer: int, experts_TK: torch.Tensor, num_experts: int) -> None:
    if experts_TK.numel() <= _FEW_IDS:  # 0.7 us, and 3 us by torch
        ids = [expert for row in experts_TK.tolist() for expert in row]
        low, high = min(ids), max(ids)
    else:
        low, high = (int(value) for value in torch.aminmax(experts_TK))
    if low < 0 or high >= num_experts:
        expert = low if low < 0 else high
        raise UnknownExpert(
            f"layer {layer}, expert {expert}: ids of this layer are 0 to {num_experts - 1}",
            layer=layer,
            expert=expert,
        )
