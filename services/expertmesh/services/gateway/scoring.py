"""The tensors of a Score call, checked, and its forward.

Shape suffixes: B batch, S sequence length, V vocabulary.
"""

from typing import Any

import torch

from expertmesh.runtime import tensors
from expertmesh.runtime.errors import InvalidInput
from expertmesh.services.gateway.sampling import Limits
from expertmesh.v1 import generate_pb2 as pb
from expertmesh.v1 import tensor_pb2


def forward(model: Any, tokens_BS: torch.Tensor, mask_BS: torch.Tensor | None) -> torch.Tensor:
    """Logits [B, S, V]."""
    mask = None if mask_BS is None else mask_BS.to(model.device)
    with torch.no_grad():
        logits: torch.Tensor = model(tokens_BS.to(model.device), attention_mask=mask).logits
    return logits


def score_tokens(message: tensor_pb2.Tensor, limits: Limits) -> torch.Tensor:
    """[B, S]; raises InvalidInput."""
    tokens_BS = tensors.from_proto(message, "tokens")
    if tokens_BS.dtype != torch.int64 or tokens_BS.dim() != 2 or not tokens_BS.numel():
        got = f"{tensors.dtype_name(tokens_BS.dtype)}{list(tokens_BS.shape)}"
        raise InvalidInput.of("tokens", expected="int64 [B, S], not empty", got=got)
    if tokens_BS.shape[1] > limits.max_positions:
        expected = f"at most {limits.max_positions} positions"
        raise InvalidInput.of("tokens", expected=expected, got=tokens_BS.shape[1])
    lowest, highest = (int(bound) for bound in tokens_BS.aminmax())
    if lowest < 0 or highest >= limits.vocab_size:
        expected = f"ids from 0 to {limits.vocab_size - 1}"
        raise InvalidInput.of("tokens", expected=expected, got=f"{lowest} to {highest}")
    return tokens_BS


def score_mask(request: pb.ScoreRequest, shape: torch.Size) -> torch.Tensor | None:
    """[B, S], or None if there is none; raises InvalidInput."""
    if not request.HasField("mask"):
        return None
    mask_BS = tensors.from_proto(request.mask, "mask")
    if mask_BS.dtype != torch.int64 or mask_BS.shape != shape:
        got = f"{tensors.dtype_name(mask_BS.dtype)}{list(mask_BS.shape)}"
        raise InvalidInput.of("mask", expected=f"int64 {list(shape)} as tokens", got=got)
    if not bool(((mask_BS == 0) | (mask_BS == 1)).all()):
        raise InvalidInput.of("mask", expected="0 or 1", got="other values")
    return mask_BS
