"""Random checkpoints of any shape, written in the Hugging Face layout.

E experts, D hidden size, F FFN size.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

_SCALE = 0.02


@dataclass(frozen=True)
class MoeShape:
    """Sizes of a model without its dense part: enough for routers and replicas.

    A Mixtral if `gated`, else a Nemotron-H, whose experts are down(gelu(up(x))).
    """

    hidden_size: int
    ffn_size: int
    num_experts: int = 8
    top_k: int = 2
    num_layers: int = 1
    dtype: str = "float32"
    gated: bool = True

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        size = getattr(torch, self.dtype).itemsize
        return (2 + self.gated) * self.hidden_size * self.ffn_size * int(size)


def write_experts(shape: MoeShape, root: Path) -> Path:
    """A checkpoint directory below `root` that has the shape's experts and gates; written once."""
    name = "-".join(str(value) for value in asdict(shape).values())
    path = root / f"moe-{name}"
    if not (path / "config.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        for layer in range(shape.num_layers):
            save_file(_layer(shape, layer), path / f"model-{layer:05}.safetensors")
        _write_index(path)
        (path / "config.json").write_text(json.dumps(_config(shape)))
    return path


def _layer(shape: MoeShape, layer: int) -> dict[str, torch.Tensor]:
    dtype = getattr(torch, shape.dtype)
    random = torch.Generator().manual_seed(layer)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random).mul_(_SCALE).to(dtype)

    block = f"model.layers.{layer}.{'block_sparse_moe' if shape.gated else 'mixer'}"
    tensors = {f"{block}.gate.weight": weight(shape.num_experts, shape.hidden_size)}
    up, down = (shape.ffn_size, shape.hidden_size), (shape.hidden_size, shape.ffn_size)
    sizes = {"w1": up, "w2": down, "w3": up} if shape.gated else {"up_proj": up, "down_proj": down}
    for expert in range(shape.num_experts):
        for name, size in sizes.items():
            tensors[f"{block}.experts.{expert}.{name}.weight"] = weight(*size)
    return tensors


def _write_index(path: Path) -> None:
    from safetensors import safe_open

    files: dict[str, str] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file.name)
    index = {"metadata": {}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _config(shape: MoeShape) -> dict[str, object]:
    return {
        "model_type": "mixtral" if shape.gated else "nemotron_h",
        "mlp_hidden_act": "gelu",
        "dtype": shape.dtype,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "num_local_experts": shape.num_experts,
        "n_routed_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 256,
    }
