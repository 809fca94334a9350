"""Tiny random transformers models of every family that has a RoutingSpec, and their routers."""

from dataclasses import fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel

from expertmesh.router.gate import GateWeights

HIDDEN_SIZE = 32

# whichever of these a family's config knows
_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "routed_scaling_factor": 1.7,
    "use_mamba_kernels": False,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
}
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k")
_BIASES = ("router.bias", "correction_bias", "expert_bias")

_SPECIAL: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"expert_selection_fn": "sigmoid", "norm_topk_prob": True},
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_v4": {"mlp_layer_types": ["moe", "moe"]},
    "flint": {"mlp_only_layers": []},
    "hunyuan_v1_moe": {"head_dim": 8},
    "laguna": {"moe_router_logit_softcapping": 3.0},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "phimoe": {"router_jitter_noise": 0.3},
}


def tiny_config(model_type: str, experts: int, top_k: int, **changes: Any) -> Any:
    """A config of this family with `experts` experts of which a token gets `top_k`."""
    if model_type == "dbrx":
        ffn = {"ffn_hidden_size": 24, "moe_num_experts": experts, "moe_top_k": top_k}
        attention = {"kv_n_heads": 2, "rope_theta": 1e4}
        sizes = {"d_model": HIDDEN_SIZE, "n_heads": 4, "n_layers": 2, "vocab_size": 64}
        return CONFIG_MAPPING["dbrx"](ffn_config=ffn | changes, attn_config=attention, **sizes)
    config_class: Any = CONFIG_MAPPING[model_type]
    known = {field.name for field in fields(config_class)}
    wanted = _COMMON | dict.fromkeys(_NUM_EXPERTS, experts) | dict.fromkeys(_TOP_K, top_k)
    aliases = getattr(config_class, "attribute_map", {})
    known -= {name for name, target in aliases.items() if target in known}
    accepted = {name: value for name, value in wanted.items() if name in known}
    return config_class(**(accepted | _SPECIAL.get(model_type, {}) | changes))


def tiny_model(config: Any, seed: int = 0) -> Any:
    """The config's model in fp32, with logits of a few units and biases that change the choice."""
    torch.manual_seed(seed)
    is_part_of_another = config.model_type == "qwen3_vl_moe_text"
    make = Qwen3VLMoeTextModel if is_part_of_another else AutoModelForCausalLM.from_config
    model = make(config).eval()
    for block in moe_blocks(model).values():
        for name, tensor in _tensors(router_of(block)).items():
            if name.endswith("weight"):
                tensor.data.normal_(0.0, 0.3)
        for name, tensor in _tensors(block).items():
            if name.endswith(_BIASES):
                tensor.data.uniform_(-0.3, 0.3)
    return model


def moe_blocks(model: Any) -> dict[int, Any]:
    """The MoE block of each layer that has one; some has."""
    found = {
        int(next(part for part in name.split(".") if part.isdigit())): module
        for name, module in model.named_modules()
        if hasattr(module, "experts") and (hasattr(module, "gate") or hasattr(module, "router"))
    }
    assert found
    return found


def router_of(block: Any) -> Any:
    """The module of the block that scores experts."""
    return getattr(block, "router", None) or block.gate


def gate_of(block: Any) -> GateWeights:
    """The parameters of the block's router, as they are in the model."""
    (weight,) = (t for name, t in _tensors(router_of(block)).items() if name.endswith("weight"))
    biases = {name: t for name, t in _tensors(block).items() if name.endswith(_BIASES)}
    bias = next((t for name, t in biases.items() if name.endswith("router.bias")), None)
    correction = None if bias is not None else next(iter(biases.values()), None)
    return GateWeights(weight, bias, None if correction is None else correction.reshape(-1))


def _tensors(module: Any) -> dict[str, torch.Tensor]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}
