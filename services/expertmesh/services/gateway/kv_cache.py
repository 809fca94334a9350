"""Keys and values of the requests that run: one tensor each, within a bound on all of them.

Shapes: L layers, H key heads, P positions, D width of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch

from expertmesh.runtime.device import probe_for
from expertmesh.runtime.errors import InsufficientMemory
from expertmesh.services.checkpoints import kv_token_bytes


class KeyValues:
    """Of one request, all layers in one tensor [2L, 1, H, P, D]: keys and values in turn."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._all: torch.Tensor | None = None
        self.capacity = 0
        """Positions there is room for."""

    def reserve(self, capacity: int) -> None:
        """Make room for so many positions; those that are filled stay."""
        if self._all is not None and capacity > self.capacity:
            old, self._all = self._all, self._empty(self._all[0], capacity)
            self._all[..., : self.capacity, :] = old
        self.capacity = capacity

    def clear(self) -> None:
        """Give the memory back."""
        self._all, self.capacity = None, 0

    def rows(self, first: int, last: int, like: torch.Tensor) -> Sequence[torch.Tensor]:
        """Views [1, H, last - first, D] of positions: of layer i, keys at 2i and values at 2i + 1.

        Args:
            like: keys [1, H, *, D]; they say how those of the model look.
        """
        if self._all is None:
            self._all = self._empty(like, self.capacity)
        return self._all.narrow(3, first, last - first).unbind(0)

    def _empty(self, like: torch.Tensor, capacity: int) -> torch.Tensor:
        return like.new_empty(2 * self._num_layers, 1, like.shape[1], capacity, like.shape[3])


class KeyValueBudget:
    """Positions of all requests together.

    Args:
        num_layers: of the model.
        max_tokens: positions that may be reserved.
        page_size: room grows by a multiple of this.
    """

    def __init__(self, num_layers: int, max_tokens: int, page_size: int) -> None:
        self._num_layers = num_layers
        self._page_size = page_size
        self._max_tokens = max_tokens
        self.num_free = max_tokens

    def new(self) -> KeyValues:
        """Without any room yet."""
        return KeyValues(self._num_layers)

    def hold(self, kv: KeyValues, num_tokens: int, most: int) -> bool:
        """Make room for `num_tokens` positions, and for more, up to `most`, where it is cheap.

        Returns:
            Whether there is room.
        """
        if num_tokens <= kv.capacity:
            return True
        available = kv.capacity + self.num_free
        if num_tokens > available:
            return False
        wanted = max(num_tokens, min(2 * kv.capacity, most))
        whole = -(-wanted // self._page_size) * self._page_size
        capacity = min(whole, available)
        self.num_free -= capacity - kv.capacity
        kv.reserve(capacity)
        return True

    def free(self, kv: KeyValues) -> None:
        """It is not used any more."""
        self.num_free += kv.capacity
        kv.clear()


def check_fits(model: Any, num_tokens: int) -> None:
    """Raises InsufficientMemory if the device cannot hold the keys and values of so many tokens."""
    needed_bytes = num_tokens * kv_token_bytes(model.config.get_text_config(), model.dtype)
    free_bytes = probe_for(str(model.device)).read().free_bytes
    if needed_bytes > free_bytes:
        raise InsufficientMemory(
            f"keys and values of {num_tokens} tokens take {needed_bytes} bytes, and this device "
            f"has {free_bytes} free; lower kv_cache_tokens",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )
