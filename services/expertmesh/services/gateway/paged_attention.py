"""Attention of continuous batching with the bits of `generate`: each request by itself.

transformers runs one SDPA over the queries of all requests and all their keys, with a mask between
them. That sums in another order than a request alone does, which is enough to turn a near tie of
two tokens, and computes every query against every other request's keys. Here the same function runs
once per request, with just the arguments `generate` gives it.

Shapes: Q queries of all requests, S keys of all requests.
"""

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def use_separate_attention() -> None:
    """Replace "sdpa" in transformers' registry; without a paged cache it does what it did."""
    AttentionInterface.register("sdpa", _sdpa)


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if cache is None:
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return out
    kwargs.pop("is_causal", None)  # false, as transformers' mask between requests is causal too
    layer = module.layer_idx
    key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=kwargs)
    bounds_q = pairwise(kwargs.pop("cu_seq_lens_q").tolist())
    bounds_k = pairwise(kwargs.pop("cu_seq_lens_k").tolist())
    parts = [
        _one_request(
            module,
            query[:, :, q0:q1],
            key[:, :, k0:k1],
            value[:, :, k0:k1],
            None if attention_mask is None else attention_mask[..., q0:q1, k0:k1],
            kwargs,
        )
        for (q0, q1), (k0, k1) in zip(bounds_q, bounds_k, strict=True)
    ]
    return torch.cat(parts, dim=1), None


def _one_request(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    num_queries, num_keys = query.shape[2], key.shape[2]
    window = kwargs.get("sliding_window")
    is_whole = num_queries in (1, num_keys)  # one new token, or the whole prompt
    if is_whole and (window is None or num_keys <= window):
        mask = None  # generate passes none either, and leaves causality to the kernel
    out: torch.Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    return out
