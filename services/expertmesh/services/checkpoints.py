"""What the processes need to know of a checkpoint before they build anything from it."""

from pathlib import Path
from typing import Any

import torch

from expertmesh.services.settings import MeshSettings


def model_name(settings: MeshSettings) -> str:
    """The model's name in requests."""
    return settings.model_name or Path(settings.model).resolve().name


def model_dtype(name: str, config: Any) -> torch.dtype:
    """The dtype called `name`; "auto" is the checkpoint's own, float32 if it does not say."""
    if name != "auto":
        return _by_name(name)
    own = config.get_text_config().dtype or config.dtype or torch.float32
    return own if isinstance(own, torch.dtype) else _by_name(own)


def _by_name(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
