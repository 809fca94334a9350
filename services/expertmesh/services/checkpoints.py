"""What the processes need to know of a checkpoint before they build anything from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertmesh.services.settings import MeshSettings

if TYPE_CHECKING:  # the name of a model is asked for by processes without torch
    import torch


def model_name(settings: MeshSettings) -> str:
    """The model's name in requests."""
    return settings.model_name or Path(settings.model).resolve().name


def model_dtype(name: str, config: Any) -> torch.dtype:
    """The dtype called `name`; "auto" is the checkpoint's own, float32 if it does not say."""
    if name != "auto":
        return _by_name(name)
    import torch

    own = config.get_text_config().dtype or config.dtype or torch.float32
    return own if isinstance(own, torch.dtype) else _by_name(own)


def _by_name(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def kv_token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Keys and values of a token in all layers of plain attention, for a transformers text config;
    families that keep less are given more than they need."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * kv_heads * head_size * dtype.itemsize)
