"""Tiny random checkpoints of every supported family, saved as the hub publishes them: made in well
under a second, odd enough to catch a wrong layout, a wrong router or a lost bias."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

VOCAB_SIZE = 256
FP8_BLOCK = 128
FP8_MAX = 448.0
MXFP4_BLOCK = 32

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "routed_scaling_factor": 1.5,
}
_LOCAL: dict[str, Any] = {
    "intermediate_size": 96,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_QWEN: dict[str, Any] = {
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_experts": 8,
    "decoder_sparse_step": 1,
}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", _LOCAL),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _QWEN | {"num_experts_per_tok": 4, "shared_expert_intermediate_size": 80},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        _QWEN | {"num_experts_per_tok": 3, "head_dim": 16, "norm_topk_prob": True},
    ),
    "deepseek_v2": ("DeepseekV2Config", _MLA | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3Config", _MLA | {"norm_topk_prob": True}),
    "olmoe": ("OlmoeConfig", _QWEN | {"intermediate_size": 48, "num_experts_per_tok": 4}),
    "gpt_oss": (
        "GptOssConfig",
        _LOCAL | {"head_dim": 16, "sliding_window": 8, "num_experts_per_tok": 3},
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        _LOCAL
        | {
            "num_experts_per_tok": 3,
            "embedding_multiplier": 2.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.25,
        },
    ),
    "phimoe": (
        "PhimoeConfig",
        _LOCAL | {"router_jitter_noise": 0.3, "attention_bias": True, "lm_head_bias": True},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            "num_hidden_layers": 3,
            "intermediate_size": 96,
            "moe_intermediate_size": 48,
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "intermediate_size": 96,
            "moe_intermediate_size": 48,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
        },
    ),
    "minimax_m2": ("MiniMaxM2Config", _LOCAL | {"num_experts_per_tok": 4, "head_dim": 16}),
    "jamba": (
        "JambaConfig",
        {
            "num_hidden_layers": 4,
            "intermediate_size": 96,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        _LOCAL | {"head_dim": 16, "intermediate_size_mlp": 80, "attention_chunk_size": 64},
    ),
    "dbrx": (
        "DbrxConfig",
        {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 3},
        },
    ),
}
# DbrxConfig copies d_model into ffn_config before it resolves the usual names
_DBRX_NAMES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "max_seq_len",
}
FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
"""The families the mesh promises to serve exactly; "llama4" is `llama4_text` in its config."""


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """The transformers config of the tiny model of this family; `overrides` replace its fields."""
    class_name, fields = _CONFIGS[model_type]
    fields = _COMMON | fields
    if model_type == "dbrx":
        fields = {_DBRX_NAMES.get(name, name): value for name, value in fields.items()}
        fields = {name: value for name, value in fields.items() if name != "num_key_value_heads"}
    return getattr(transformers, class_name)(**(fields | overrides))


def tiny_model(
    model_type: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> Any:
    """A random model in evaluation mode whose router and correction biases are not zero."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).to(dtype).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("bias"):
            tensor.data.normal_(0.0, 0.1)
        if name.endswith("e_score_correction_bias"):
            tensor.data = tensor.data.float()
    return model


def tiny_checkpoint(
    model_type: str,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sharded: bool = False,
    fused: bool = False,
    **overrides: Any,
) -> Path:
    """A checkpoint directory of one of FAMILIES.

    Args:
        directory: made if it is not there; returned.
        dtype: of the weights on disk (correction biases stay float32, as on the hub).
        sharded: several files and a model.safetensors.index.json.
        fused: transformers 5's own layout (one 3-D tensor per layer) instead of the hub's.
        overrides: fields of the config, e.g. num_hidden_layers=1.
    """
    model = tiny_model(model_type, dtype=dtype, seed=seed, **overrides)
    max_shard_size = "100KB" if sharded else "5GB"
    model.save_pretrained(directory, max_shard_size=max_shard_size, save_original_format=not fused)
    return Path(directory)


def fp8_checkpoint(directory: str | Path, *, seed: int = 0) -> Path:
    """DeepSeek-V3 as the hub has it: e4m3 weights, a float32 `weight_scale_inv` per 128 x 128.

    transformers without a GPU dequantises it, and then runs it in bfloat16 only.
    """
    names = ("hidden_size", "intermediate_size", "moe_intermediate_size")
    sizes: dict[str, Any] = dict.fromkeys(names, 2 * FP8_BLOCK)
    path = tiny_checkpoint("deepseek_v3", directory, dtype=torch.bfloat16, seed=seed, **sizes)
    _rewrite(path, _quantise_linears)
    _set_quantization(
        path,
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        },
    )
    return path


def mxfp4_checkpoint(directory: str | Path, *, seed: int = 0) -> Path:
    """gpt-oss as the hub has it: expert weights as 4-bit `_blocks` and `_scales`, the rest bf16."""
    path = tiny_checkpoint("gpt_oss", directory, dtype=torch.bfloat16, seed=seed)
    generator = torch.Generator().manual_seed(seed)

    def pack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: packed
            for key, tensor in tensors.items()
            for name, packed in _random_mxfp4(key, tensor, generator).items()
        }

    _rewrite(path, pack)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    _set_quantization(path, {"quant_method": "mxfp4", "modules_to_not_convert": [*kept, "lm_head"]})
    return path


Tensors = dict[str, torch.Tensor]


def _rewrite(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = path / "model.safetensors"
    tensors = change({name: tensor.clone() for name, tensor in load_file(file).items()})
    save_file(tensors, file, metadata={"format": "pt"})


def _set_quantization(path: Path, quantization: dict[str, Any]) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": quantization}
    file.write_text(json.dumps(config, indent=2))


def _quantise_linears(tensors: Tensors) -> Tensors:
    """Every linear layer but the router and the head, as DeepSeek does."""
    changed: Tensors = {}
    for name, tensor in tensors.items():
        linear = name.endswith("_proj.weight") or "kv_a_proj_with_mqa.weight" in name
        if not linear:
            changed[name] = tensor
            continue
        changed[name], changed[f"{name}_scale_inv"] = _quantise_fp8(tensor)
    return changed


def _quantise_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A [N, M] weight as e4m3 and its [ceil(N / 128), ceil(M / 128)] float32 scales."""
    quantised = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    num_rows, num_columns = (-(-size // FP8_BLOCK) for size in weight.shape)
    scales = torch.empty(num_rows, num_columns)
    for row in range(num_rows):
        for column in range(num_columns):
            block = (
                slice(row * FP8_BLOCK, (row + 1) * FP8_BLOCK),
                slice(column * FP8_BLOCK, (column + 1) * FP8_BLOCK),
            )
            scale = weight[block].float().abs().max() / FP8_MAX
            quantised[block] = (weight[block].float() / scale).to(torch.float8_e4m3fn)
            scales[row, column] = scale
    return quantised, scales


def _random_mxfp4(key: str, tensor: torch.Tensor, generator: torch.Generator) -> Tensors:
    """Random packed values in place of an expert weight [E, in, out]; everything else as it is."""
    if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {key: tensor}
    num_experts, num_in, num_out = tensor.shape
    shape = (num_experts, num_out, num_in // MXFP4_BLOCK)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(121, 124, shape, dtype=torch.uint8, generator=generator)
    return {f"{key}_blocks": blocks, f"{key}_scales": scales}
