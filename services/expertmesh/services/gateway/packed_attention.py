"""Attention of a forward over several requests, with the bits of `generate`: each by itself.

One attention over the queries of all requests and all their keys, with a mask between them, sums in
another order than a request alone does, which is enough to turn a near tie of two tokens. Here
transformers' own function runs once per request, with just the arguments `generate` gives it.

Shapes: T tokens of all requests, H heads, S keys of one request, D width of a head.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from expertmesh.services.gateway.kv_cache import KeyValues

_NAME = "expertmesh_packed"
Attend = Callable[..., tuple[torch.Tensor, Any]]


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of a forward that belong to one request."""

    kv: KeyValues
    first: int
    """Position of the first of them."""
    length: int

    @property
    def end(self) -> int:
        return self.first + self.length


class PackedModel:
    """Runs the tokens of several requests in one forward.

    Args:
        model: its attention implementation is changed.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self._model = model
        self._implementation = config._attn_implementation
        self._windows = [
            getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers
        ]
        AttentionInterface.register(_NAME, _attend)
        model.set_attn_implementation(_NAME)

    @property
    def num_layers(self) -> int:
        return len(self._windows)

    def logits(
        self, tokens_T: Sequence[int], parts: Sequence[Part], wanted: Sequence[int]
    ) -> torch.Tensor:
        """Logits [W, V] of the tokens at the W `wanted` places; keys and values go to the parts.

        Args:
            tokens_T: part after part.
        """
        device = self._model.device
        positions_T = [position for part in parts for position in range(part.first, part.end)]
        keep = 0 if len(wanted) == len(tokens_T) else torch.tensor(wanted, dtype=torch.int64)
        out = self._model(
            input_ids=torch.tensor([tokens_T], device=device),
            position_ids=torch.tensor([positions_T], device=device),
            use_cache=False,
            logits_to_keep=keep,
            packed=_Packed(parts, self._windows, self._implementation),
        )
        logits_WV: torch.Tensor = out.logits[0]
        return logits_WV


class _Packed:
    """One forward's attention."""

    def __init__(
        self, parts: Sequence[Part], windows: Sequence[int | None], implementation: str
    ) -> None:
        self._parts = parts
        self._windows = windows
        self._implementation = implementation
        self._lengths = [part.length for part in parts]
        self._new: list[Sequence[torch.Tensor]] = []
        self._seen: dict[int | None, list[Sequence[torch.Tensor]]] = {}
        self._masks: dict[int | None, list[torch.Tensor | None]] = {}

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """[1, T, H, D] of one layer."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        window = self._windows[layer]
        if not self._new:
            self._new = [part.kv.rows(part.first, part.end, key) for part in self._parts]
        if window not in self._seen:
            self._look_back(window, key)
        keys, values = (torch.split(own, self._lengths, 2) for own in (key, value))
        for new, own_key, own_value in zip(self._new, keys, values, strict=True):
            new[2 * layer].copy_(own_key)
            new[2 * layer + 1].copy_(own_value)
        attend = self._function(module)
        queries = torch.split(query, self._lengths, 2)
        outs = [
            attend(module, own, seen[2 * layer], seen[2 * layer + 1], mask, **kwargs)[0]
            for own, seen, mask in zip(
                queries, self._seen[window], self._masks[window], strict=True
            )
        ]
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0]

    def _look_back(self, window: int | None, key: torch.Tensor) -> None:
        """What the parts' tokens see in layers of that sliding window, or without one."""
        firsts = [0 if window is None else max(0, p.first - window + 1) for p in self._parts]
        pairs = list(zip(self._parts, firsts, strict=True))
        self._seen[window] = [part.kv.rows(first, part.end, key) for part, first in pairs]
        self._masks[window] = [self._mask(part, first, window, key) for part, first in pairs]

    def _mask(
        self, part: Part, first: int, window: int | None, key: torch.Tensor
    ) -> torch.Tensor | None:
        """As `generate` makes it for a request alone."""
        function = causal_mask_function
        if window is not None:
            function = sliding_window_causal_mask_function(window)
        mask: torch.Tensor | None = AttentionMaskInterface()[self._implementation](
            batch_size=1,
            q_length=part.length,
            kv_length=part.end - first,
            q_offset=part.first,
            kv_offset=first,
            mask_function=function,
            local_size=window,
            dtype=key.dtype,
            device=key.device,
        )
        return mask

    def _function(self, module: torch.nn.Module) -> Attend:
        own = sys.modules[type(module).__module__]
        found: Attend = AttentionInterface().get_interface(
            self._implementation, own.eager_attention_forward
        )
        return found


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: _Packed,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention implementation that `PackedModel` registers with transformers."""
    return packed.attend(module, query, key, value, kwargs), None
