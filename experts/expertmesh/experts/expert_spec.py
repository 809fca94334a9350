"""What one expert computes, and how transformers keeps its weights in memory, read off a config.

Only model types whose expert code in transformers 5.23 has been compared are here: the tests run
every one of them against its own module.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from expertmesh.runtime.errors import UnsupportedCheckpoint

Gate = Literal["glu", "clamped_glu", "gpt_oss", "none"]
Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2"]

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
}

# down(act(gate(x)) * up(x)) with the activation under `hidden_act`, weights [out, in]
_PLAIN_NAMES = (
    "afmoe axk2 cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe "
    "flex_olmo flint glm4_moe glm4_moe_lite glm_moe_dsa granitemoe granitemoe_swa "
    "granitemoeshared hunyuan_v1_moe hy_v3 jamba kolibri1 mellum minimax minimax_m2 mixtral olmoe "
    "phimoe qwen2_moe qwen3_moe qwen3_next solar_open"
)
_PLAIN = frozenset(_PLAIN_NAMES.split())
_OTHER = frozenset({"dbrx", "gpt_oss", "hy_v4", "llama4_text", "nemotron_h"})
SUPPORTED_MODEL_TYPES: tuple[str, ...] = tuple(sorted(_PLAIN | _OTHER))
"""The `model_type`s whose experts this version computes exactly as transformers does."""


@dataclass(frozen=True)
class ExpertSpec:
    """The arithmetic of an expert, with g = gate(x), u = up(x) and L = `limit`.

    glu: act(g) * u. clamped_glu: act(min(g, L)) * clamp(u, -L, L). gpt_oss: both clamped, then
    (u + 1) * g * sigmoid(alpha * g). none: act(u). Then down(...); biases where the checkpoint has
    them.
    """

    act: Activation = "silu"
    gate: Gate = "glu"
    limit: float = 0.0
    alpha: float = 0.0
    gate_up_transposed: bool = False
    """Kept [in, out] in memory. The bits of a float32 product depend on it (docs/exactness.md)."""
    down_transposed: bool = False
    interleaved: bool = False
    """Gate and up alternate along the output dimension instead of following each other."""

    @classmethod
    def from_config(cls, text_config: Mapping[str, Any]) -> "ExpertSpec":
        """The spec of a model from the language part of its config.json, fields defaulted alike.

        Raises:
            UnsupportedCheckpoint: a model type or an activation that is not supported.
        """
        model_type = str(text_config.get("model_type", ""))
        match model_type:
            case "gpt_oss":
                return _gpt_oss(text_config)
            case "dbrx":
                name = (_ffn_config(text_config).get("ffn_act_fn") or {}).get("name", "silu")
                return cls(act=_activation(name), down_transposed=True)
            case "llama4_text":
                act = _activation(text_config.get("hidden_act", "silu"))
                return cls(act=act, gate_up_transposed=True, down_transposed=True)
            case "hy_v4":
                limit = text_config.get("swiglu_limit", _HY_V4_LIMIT)
                return cls(gate="clamped_glu", limit=float(limit))
            case "nemotron_h":
                return cls(act=_activation(text_config.get("mlp_hidden_act", "relu2")), gate="none")
            case _ if model_type in _PLAIN:
                return cls(act=_activation(text_config.get("hidden_act", "silu")))
        raise UnsupportedCheckpoint(
            f"config.json: model_type {model_type!r} is not supported. Supported: "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}.",
            model_type=model_type,
        )


_HY_V4_LIMIT = 10.0


def _gpt_oss(text_config: Mapping[str, Any]) -> ExpertSpec:
    return ExpertSpec(
        gate="gpt_oss",
        limit=float(text_config.get("swiglu_limit", 7.0)),
        alpha=float(text_config.get("swiglu_alpha", 1.702)),
        gate_up_transposed=True,
        down_transposed=True,
        interleaved=True,
    )


def _activation(name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise UnsupportedCheckpoint(
            f"config.json: activation {name!r} is not supported. Supported: "
            f"{', '.join(ACTIVATIONS)}.",
            activation=name,
        )
    return ACTIVATIONS[name]


def _ffn_config(text_config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = text_config.get("ffn_config")
    return nested if isinstance(nested, Mapping) else {}


def declared_num_experts(text_config: Mapping[str, Any]) -> int | None:
    """Routed experts per layer as the config says, under any family's name; None if it does not."""
    for source in (text_config, _ffn_config(text_config)):
        for name in ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"):
            if isinstance(value := source.get(name), int):
                return value
    return None


def declared_num_layers(text_config: Mapping[str, Any]) -> int | None:
    """Decoder layers as the config says; layers from there on are for multi-token prediction."""
    for name in ("num_hidden_layers", "n_layers", "num_layers"):
        if isinstance(value := text_config.get(name), int):
            return value
    return None
