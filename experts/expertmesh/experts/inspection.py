"""What a checkpoint holds, from config and headers alone: the facts of `expertmesh inspect`."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expertmesh.experts.expert_spec import ExpertSpec
from expertmesh.experts.reader import ExpertReader
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.hf_config import load_config

_TOP_K_NAMES = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint in numbers.

    Attributes:
        architecture: the transformers class, e.g. "MixtralForCausalLM".
        layout: how the experts lie on disk, in words.
        top_k: experts per token.
        ffn_size: of one routed expert.
        disk_dtype: safetensors' name of the type most expert bytes are in.
        total_bytes: of all tensors on disk, dense_bytes + expert_bytes + ignored_bytes.
        dense_bytes: everything but routed experts: what the gateway holds.
        ignored_bytes: layers that are not served (multi-token prediction).
        num_experts: by layer, layers with routed experts only.
        expert_disk_bytes: by layer, of one expert on disk.
        expert_parameters: by layer, of one expert.
    """

    path: Path
    architecture: str
    model_type: str
    spec: ExpertSpec
    layout: str
    num_layers: int
    top_k: int
    hidden_size: int
    ffn_size: int
    disk_dtype: str
    total_bytes: int
    dense_bytes: int
    expert_bytes: int
    ignored_bytes: int
    num_experts: Mapping[int, int]
    expert_disk_bytes: Mapping[int, int]
    expert_parameters: Mapping[int, int]

    def expert_held_bytes(self, dtype: torch.dtype) -> dict[int, int]:
        """Layer -> bytes of one expert once it is held in `dtype`."""
        return {layer: num * dtype.itemsize for layer, num in self.expert_parameters.items()}


def inspect_checkpoint(path: str | Path) -> CheckpointReport:
    """Reads config.json and headers only.

    Raises:
        CheckpointError: as Checkpoint.open and ExpertReader do.
    """
    checkpoint = Checkpoint.open(path)
    reader = ExpertReader(checkpoint)
    config = load_config(checkpoint.path).get_text_config()
    layers = reader.index.layers
    first = layers[reader.layers()[0]]
    keys = {
        layer: {key for parts in layout.parts for key in parts.values()}
        for layer, layout in layers.items()
    }
    layer_bytes = {layer: _sum_bytes(checkpoint, names) for layer, names in keys.items()}
    total_bytes = _sum_bytes(checkpoint, checkpoint.names())
    ignored_bytes = _sum_bytes(checkpoint, reader.index.ignored)
    expert_bytes = sum(layer_bytes.values())
    return CheckpointReport(
        path=checkpoint.path,
        architecture=", ".join(checkpoint.config.get("architectures") or ("unknown",)),
        model_type=checkpoint.model_type,
        spec=reader.spec,
        layout=first.family.value,
        num_layers=config.num_hidden_layers,
        top_k=_top_k(config),
        hidden_size=first.hidden_size,
        ffn_size=first.ffn_size,
        disk_dtype=_main_dtype(checkpoint, [key for names in keys.values() for key in names]),
        total_bytes=total_bytes,
        dense_bytes=total_bytes - expert_bytes - ignored_bytes,
        expert_bytes=expert_bytes,
        ignored_bytes=ignored_bytes,
        num_experts={layer: layout.num_experts for layer, layout in layers.items()},
        expert_disk_bytes={
            layer: layer_bytes[layer] // layout.num_experts for layer, layout in layers.items()
        },
        expert_parameters={
            layer: reader.expert_shape(layer).num_parameters for layer in reader.layers()
        },
    )


def _top_k(config: Any) -> int:
    sources = (config, getattr(config, "ffn_config", None))
    found = (getattr(source, name, None) for source in sources for name in _TOP_K_NAMES)
    return next(value for value in found if isinstance(value, int))


def _sum_bytes(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    return sum(checkpoint.num_bytes(name) for name in names)


def _main_dtype(checkpoint: Checkpoint, names: list[str]) -> str:
    sizes: Counter[str] = Counter()
    for name in names:
        sizes[checkpoint.dtype(name)] += checkpoint.num_bytes(name)
    return sizes.most_common(1)[0][0]
