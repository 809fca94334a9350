"""RoutingSpec's validation, and which families have one."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from tests.unit.router.tiny_routers import tiny_config
from transformers import AutoConfig, DbrxConfig, MixtralConfig, NemotronHConfig

from expertmesh.router.families import routing_spec, supported_model_types
from expertmesh.router.routing_spec import RoutingSpec
from expertmesh.runtime.errors import ConfigError, UnknownExpert, UnsupportedCheckpoint


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("num_experts", {"num_experts": 0}),
        ("top_k", {"top_k": 0}),
        ("top_k", {"top_k": 9}),
        ("top_k", {"num_experts": 64, "top_k": 17}),
        ("top_k", {"n_group": 4, "topk_group": 1, "top_k": 3}),
        ("top_k", {"select": "sparsemixer", "top_k": 3}),
        ("n_group", {"n_group": 3}),
        ("n_group", {"n_group": 0}),
        ("n_group", {"n_group": 8, "topk_group": 4}),
        ("topk_group", {"n_group": 4, "topk_group": 5}),
        ("topk_group", {"n_group": 4, "topk_group": 0}),
        ("score", {"score": "relu"}),
        ("score_dtype", {"score_dtype": "fp16"}),
        ("select", {"select": "random"}),
        ("logits", {"logits": "fp64"}),
        ("logits", {"logits": "fp32", "linear_bias": True}),
        ("gate_dtype", {"gate_dtype": "bf16"}),
        ("correction_dtype", {"correction_dtype": "bf16"}),
        ("group_score", {"group_score": "sum"}),
        ("weights_dtype", {"weights_dtype": "fp32"}),
        ("apply", {"apply": "never"}),
        ("combine", {"combine": "partial"}),
        ("logit_softcap", {"logit_softcap": -1.0}),
        ("jitter_eps", {"jitter_eps": -0.1}),
        ("renorm_eps", {"renorm_eps": -1e-6}),
        ("renorm_min", {"renorm_min": -1e-6}),
        ("renorm_p", {"renorm_p": 0.0}),
    ],
)
def test_wrong_value_names_the_field(field: str, changes: dict[str, Any]) -> None:
    good: dict[str, Any] = {"num_experts": 8, "top_k": 2}
    RoutingSpec(**good)
    with pytest.raises(ConfigError) as caught:
        RoutingSpec(**(good | changes))
    assert caught.value.fields["field"] == field
    assert caught.value.message.startswith(f"{field}: expected ")


def test_top_k_error_says_what_came() -> None:
    with pytest.raises(ConfigError, match=r"^top_k: expected 1 to 8, got 9\."):
        RoutingSpec(num_experts=8, top_k=9)


def test_spec_is_immutable() -> None:
    spec = RoutingSpec(num_experts=8, top_k=2)
    with pytest.raises(FrozenInstanceError):
        spec.top_k = 3  # type: ignore[misc]


@pytest.mark.parametrize("model_type", supported_model_types())
def test_numbers_come_from_the_config(model_type: str) -> None:
    top_k = 2 if model_type == "phimoe" else 3
    spec = routing_spec(tiny_config(model_type, experts=24, top_k=top_k), 1)
    assert (spec.num_experts, spec.top_k) == (24, top_k)
    assert spec.combine == ("eager" if model_type == "dbrx" else "slot_sum")
    assert spec.apply == ("before" if model_type == "llama4_text" else "after")


def test_per_layer_numbers() -> None:
    config = tiny_config("hunyuan_v1_moe", 8, 2, moe_topk=[1, 2])
    assert [routing_spec(config, layer).top_k for layer in (0, 1)] == [1, 2]


def test_text_part_of_a_larger_config() -> None:
    config = AutoConfig.for_model("llama4")
    assert routing_spec(config, 0).num_experts == config.text_config.num_local_experts


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (AutoConfig.for_model("zaya"), "carries state"),
        (AutoConfig.for_model("gemma4_text"), "does not read what its experts read"),
        (AutoConfig.for_model("longcat_flash"), "identities"),
        (AutoConfig.for_model("llama"), "no RoutingSpec"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_unsupported_family(config: Any, why: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=why) as caught:
        routing_spec(config, 0)
    message = caught.value.message
    assert f"Forward is not available for model_type {config.model_type!r}" in message
    assert "Dispatch works" in message
    assert "mixtral" in message
    assert caught.value.fields["model_type"] == config.model_type


def test_layers_that_route_by_token_id_are_unsupported() -> None:
    config = tiny_config("deepseek_v4", 8, 2, mlp_layer_types=["hash_moe", "moe"])
    assert routing_spec(config, 1).top_k == 2
    with pytest.raises(UnsupportedCheckpoint, match="layer 0 routes by token id"):
        routing_spec(config, 0)


def test_latent_experts_are_unsupported() -> None:
    with pytest.raises(UnsupportedCheckpoint, match="moe_latent_size"):
        routing_spec(NemotronHConfig(moe_latent_size=16), 0)


@pytest.mark.parametrize("layer", [-1, 2])
def test_layer_out_of_range(layer: int) -> None:
    with pytest.raises(UnknownExpert, match=f"layer {layer}: mixtral has layers 0 to 1"):
        routing_spec(MixtralConfig(num_hidden_layers=2), layer)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (MixtralConfig(num_local_experts=4, num_experts_per_tok=5), "top_k"),
        (DbrxConfig(ffn_config={"moe_num_experts": 4, "moe_top_k": 5}), "top_k"),
        (tiny_config("cohere2_moe", 8, 2, expert_selection_fn="relu"), "score"),
        (tiny_config("deepseek_v3", 8, 2, n_group=3), "n_group"),
    ],
    ids=["mixtral", "dbrx", "cohere2_moe", "deepseek_v3"],
)
def test_contradictory_config_names_the_field(config: Any, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        routing_spec(config, 0)
    assert caught.value.fields["field"] == field
