"""The dense part of a checkpoint as a transformers model: its experts are never read from disk."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from expertmesh.client.remote_experts import ExpertCaller, swap_experts
from expertmesh.runtime.errors import (
    CheckpointError,
    DamagedShard,
    MissingShard,
    UnsupportedCheckpoint,
)
from expertmesh.runtime.hf_config import load_config

_EXPERT_KEYS = r"\.experts\."
_DENSE_QUANTIZED = {"fp8"}
"""Quantisation methods that reach beyond the experts (mxfp4 does not)."""


def load_skeleton(
    path: str | Path,
    caller: ExpertCaller,
    *,
    dtype: torch.dtype | str | None = "auto",
    **config_overrides: Any,
) -> Any:
    """The checkpoint's causal language model without expert weights, ready for inference.

    Experts are replaced while the model is still on the meta device, so transformers takes their
    tensors for unexpected ones and never reads them. FP8 weights of the dense part are dequantised.

    Args:
        path: a Hugging Face checkpoint directory.
        caller: where the experts are.
        dtype: of the dense part; "auto" or None is the checkpoint's own.
        config_overrides: fields of the config, `attn_implementation`, or
            `experts_implementation="eager"` to sum as transformers' eager loop does.

    Returns:
        A `transformers.PreTrainedModel`.

    Raises:
        NotACheckpoint, MissingShard, DamagedShard: the directory is not as it should be.
        UnsupportedCheckpoint: transformers knows no such model, or it has no experts.
        CheckpointError: tensors of the dense part are not there.
    """
    config = _dense_config(Path(path), config_overrides)
    model_class = _causal_class(config)
    try:
        model, info = _skeleton_class(model_class, caller).from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            output_loading_info=True,
            local_files_only=True,
        )
    except SafetensorError as error:
        raise DamagedShard(
            f"{path}: a safetensors file cannot be read ({error}); copy it again", path=path
        ) from error
    except OSError as error:
        raise MissingShard(f"{path}: {error}", path=path) from error
    _check_complete(path, info["missing_keys"])
    model.__class__ = model_class
    return model.eval()


def share_skeleton(model: Any) -> Any:
    """A second model over the same parameters with a config, caches and buffers of its own.

    Continuous batching changes the attention implementation of the model it runs; whoever runs a
    plain forward beside it needs this.
    """
    shared: list[object] = [*model.parameters()]
    shared += [module.caller for module in model.modules() if hasattr(module, "caller")]
    return copy.deepcopy(model, {id(value): value for value in shared})


def _dense_config(path: Path, overrides: dict[str, Any]) -> Any:
    config = load_config(path, **overrides)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        _adapt_quantization(config, dict(quantization))
    return config


def _adapt_quantization(config: Any, quantization: dict[str, Any]) -> None:
    """Dequantises the dense part on load, or drops the setting when only experts are quantised."""
    if quantization.get("quant_method") in _DENSE_QUANTIZED:
        config.quantization_config = quantization | {"dequantize": True}
    else:
        del config.quantization_config


def _causal_class(config: Any) -> Any:
    try:
        found = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UnsupportedCheckpoint(
            f"model_type {config.model_type!r}: transformers has no causal language model for it",
            model_type=config.model_type,
        ) from None
    return found[0] if isinstance(found, tuple) else found


def _skeleton_class(model_class: Any, caller: ExpertCaller) -> Any:
    """A subclass that swaps its experts at the end of __init__."""

    class Skeleton(model_class):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            swap_experts(self, caller)
            self._keys_to_ignore_on_load_unexpected |= {_EXPERT_KEYS}

    # transformers keys its registries by what a class calls itself
    for name in ("__name__", "__qualname__", "__module__"):
        setattr(Skeleton, name, getattr(model_class, name))
    return Skeleton


def _check_complete(path: str | Path, missing_keys: set[str]) -> None:
    if missing_keys:
        some = ", ".join(sorted(missing_keys)[:3])
        raise CheckpointError(
            f"{path}: {len(missing_keys)} tensors of the dense part are missing, such as {some}; "
            "the download is incomplete or config.json belongs to another model",
            path=path,
        )
