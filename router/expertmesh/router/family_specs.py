"""One function per router class of transformers 5.23: its config as a RoutingSpec.

`families` maps model types to them. Values restate models/<family>/modeling_<family>.py.
"""

from dataclasses import replace
from typing import Any

from expertmesh.router.routing_spec import RoutingSpec
from expertmesh.runtime.errors import UnsupportedCheckpoint

Config = Any
"""A transformers text config; transformers is not typed."""


def forward_unavailable(model_type: str, why: str, *also: str) -> UnsupportedCheckpoint:
    """The error for a model whose gate only its own code can run."""
    parts = (
        f"Forward is not available for model_type {model_type!r}: {why}.",
        "Dispatch works: route the rows with the model's own router.",
        *also,
    )
    return UnsupportedCheckpoint(" ".join(parts), model_type=model_type)


def _plain(config: Config, **fields: Any) -> RoutingSpec:
    return RoutingSpec(num_experts=config.num_experts, top_k=config.num_experts_per_tok, **fields)


def _local(config: Config, **fields: Any) -> RoutingSpec:
    return RoutingSpec(
        num_experts=config.num_local_experts, top_k=config.num_experts_per_tok, **fields
    )


def mixtral(config: Config, layer: int) -> RoutingSpec:
    return _local(config, renorm=True)


def qwen(config: Config, layer: int) -> RoutingSpec:
    return _plain(config, renorm=config.norm_topk_prob, weights_dtype="input")


def qwen_renormed(config: Config, layer: int) -> RoutingSpec:
    return _plain(config, renorm=True, weights_dtype="input")


def jamba(config: Config, layer: int) -> RoutingSpec:
    return _plain(config, weights_dtype="input")


def hunyuan(config: Config, layer: int) -> RoutingSpec:
    return RoutingSpec(
        num_experts=config.num_experts,
        top_k=_at(config.moe_topk, layer),
        gate_dtype="fp32",
        logits="fp32",
        renorm=True,
    )


def granite(config: Config, layer: int) -> RoutingSpec:
    return _local(config, select="logits", weights_dtype="input")


def aria(config: Config, layer: int) -> RoutingSpec:
    return RoutingSpec(
        num_experts=config.moe_num_experts,
        top_k=config.moe_topk,
        select="logits",
        score_dtype="native",
    )


def gpt_oss(config: Config, layer: int) -> RoutingSpec:
    return _local(config, linear_bias=True, select="logits", score_dtype="native")


def cohere2(config: Config, layer: int) -> RoutingSpec:
    is_sigmoid = config.expert_selection_fn == "sigmoid"
    return _plain(
        config,
        select="logits",
        score=config.expert_selection_fn,
        score_dtype="native" if is_sigmoid else "fp32",
        renorm=is_sigmoid and config.norm_topk_prob,
        weights_dtype="input",
    )


def deepseek_v2(config: Config, layer: int) -> RoutingSpec:
    is_grouped = config.topk_method == "group_limited_greedy"
    return _plain(
        config,
        logits="fp32",
        n_group=config.n_group if is_grouped else 1,
        topk_group=config.topk_group if is_grouped else 1,
        group_score="max",
        group_fill=0.0,
        weights_from_choice=is_grouped,
        scale=config.routed_scaling_factor,
        topk_sorted=False,
    )


def deepseek_v3(config: Config, layer: int) -> RoutingSpec:
    return _local(config, **_deepseek_v3_fields(config))


def exaone(config: Config, layer: int) -> RoutingSpec:
    return _plain(config, **_deepseek_v3_fields(config))


def _deepseek_v3_fields(config: Config) -> dict[str, Any]:
    return {
        "logits": "fp32",
        "score": "sigmoid",
        "correction_bias": True,
        "n_group": config.n_group or 1,
        "topk_group": config.topk_group or 1,
        "renorm": bool(config.norm_topk_prob),
        "renorm_eps": 1e-20,
        "scale": config.routed_scaling_factor,
        "topk_sorted": False,
    }


def axk2(config: Config, layer: int) -> RoutingSpec:
    return replace(deepseek_v3(config, layer), group_fill=0.0)


def kimi_linear(config: Config, layer: int) -> RoutingSpec:
    return replace(deepseek_v3(config, layer), correction_dtype="model")


def nemotron_h(config: Config, layer: int) -> RoutingSpec:
    if config.moe_latent_size is not None:
        why = "with a moe_latent_size its experts do not read what its gate reads"
        raise forward_unavailable(config.model_type, why)
    return deepseek_v3(config, layer)


def hy_v3(config: Config, layer: int) -> RoutingSpec:
    return _local(
        config,
        logits="fp32",
        score="sigmoid",
        correction_bias=True,
        renorm=True,
        renorm_eps=1e-20,
        scale=config.router_scaling_factor,
        topk_sorted=False,
    )


def minimax_m2(config: Config, layer: int) -> RoutingSpec:
    return _local(
        config,
        score="sigmoid",
        correction_bias=True,
        correction_dtype="model",
        renorm=True,
        topk_sorted=False,
    )


def afmoe(config: Config, layer: int) -> RoutingSpec:
    return _plain(
        config,
        score="sigmoid",
        correction_bias=True,
        correction_dtype="model",
        renorm=True,
        renorm_eps=1e-20,
        scale=config.route_scale,
    )


def ernie(config: Config, layer: int) -> RoutingSpec:
    return _plain(
        config,
        gate_dtype="fp32",
        logits="fp32",
        correction_bias=True,
        renorm=True,
        renorm_min=config.moe_norm_min,
        weights_dtype="input",
    )


def flint(config: Config, layer: int) -> RoutingSpec:
    return _plain(
        config,
        gate_dtype="fp32",
        logits="fp32",
        score="sigmoid",
        renorm=config.norm_topk_prob,
    )


def kolibri1(config: Config, layer: int) -> RoutingSpec:
    return _plain(
        config,
        logits="fp32",
        select="logits",
        score="sigmoid",
        correction_bias=True,
        renorm=config.norm_topk_prob,
    )


def laguna(config: Config, layer: int) -> RoutingSpec:
    return _plain(
        config,
        logit_softcap=config.moe_router_logit_softcapping,
        score="sigmoid",
        correction_bias=True,
        correction_dtype="model",
        renorm=True,
        weights_dtype="input",
    )


def lfm2(config: Config, layer: int) -> RoutingSpec:
    return _plain(
        config,
        score="sigmoid",
        score_dtype="native",
        correction_bias=config.use_expert_bias,
        renorm=config.norm_topk_prob,
        renorm_eps=1e-6,
        scale=config.routed_scaling_factor,
    )


def deepseek_v4(config: Config, layer: int) -> RoutingSpec:
    if config.mlp_layer_types[layer] == "hash_moe":
        raise forward_unavailable(
            config.model_type, f"layer {layer} routes by token id, not by its gate"
        )
    return _local(
        config,
        score=config.scoring_func,
        score_dtype="native",
        correction_bias=True,
        renorm=True,
        renorm_eps=1e-20,
        scale=config.routed_scaling_factor,
        topk_sorted=False,
    )


def inkling2(config: Config, layer: int) -> RoutingSpec:
    return _local(
        config,
        gate_dtype="fp32",
        logits="fp32",
        score=config.scoring_func,
        correction_bias=True,
        renorm=True,
        renorm_eps=1e-20,
        scale=config.routed_scaling_factor,
        topk_sorted=False,
    )


def phimoe(config: Config, layer: int) -> RoutingSpec:
    return _local(config, select="sparsemixer", jitter_eps=config.router_jitter_noise)


def llama4(config: Config, layer: int) -> RoutingSpec:
    return _local(
        config,
        select="logits",
        score="sigmoid",
        score_all=True,
        weights_dtype="input",
        apply="before",
    )


def dbrx(config: Config, layer: int) -> RoutingSpec:
    ffn = config.ffn_config
    return RoutingSpec(
        num_experts=ffn.moe_num_experts,
        top_k=ffn.moe_top_k,
        score_dtype="native",
        renorm=ffn.moe_normalize_expert_weights is not None,
        renorm_p=ffn.moe_normalize_expert_weights,
        combine="eager",
    )


def _at(value: int | list[int], layer: int) -> int:
    """A number that a config gives once for all layers, or per layer."""
    return value if isinstance(value, int) else value[layer]
