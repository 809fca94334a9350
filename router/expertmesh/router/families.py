"""The RoutingSpec of every model family whose gate the router service can run by itself.

Everything else is served by `Dispatch`, with the model's own router in the caller.
"""

from collections.abc import Callable

from expertmesh.router import family_specs as specs
from expertmesh.router.family_specs import Config, forward_unavailable
from expertmesh.router.routing_spec import RoutingSpec
from expertmesh.runtime.errors import UnknownExpert

SpecOf = Callable[[Config, int], RoutingSpec]


def routing_spec(config: Config, layer: int) -> RoutingSpec:
    """The routing of one decoder layer.

    Args:
        config: the model's config, or its text config.
        layer: index of the decoder layer; whether it has experts at all, its tensors tell.

    Raises:
        UnsupportedCheckpoint: the family needs its own router code, so only `Dispatch` serves it.
        UnknownExpert: the model has no such layer.
        ConfigError: the config's numbers contradict each other; names the field.
    """
    text_config = config.get_text_config()
    model_type = text_config.model_type
    if model_type not in _SPECS:
        why = _WHY_NOT.get(model_type, "it has no RoutingSpec")
        supported = f"Forward knows these model types: {', '.join(supported_model_types())}."
        raise forward_unavailable(model_type, why, supported)
    num_layers = text_config.num_hidden_layers
    if not 0 <= layer < num_layers:
        what = f"layer {layer}: {model_type} has layers 0 to {num_layers - 1}."
        raise UnknownExpert(what, layer=layer, num_layers=num_layers)
    return _SPECS[model_type](text_config, layer)


def supported_model_types() -> tuple[str, ...]:
    """The model types `routing_spec` knows, sorted."""
    return tuple(sorted(_SPECS))


_SPECS: dict[str, SpecOf] = {
    "mixtral": specs.mixtral,
    "minimax": specs.mixtral,
    "qwen2_moe": specs.qwen,
    "qwen3_moe": specs.qwen,
    "qwen3_next": specs.qwen,
    "qwen4_exp_text": specs.qwen,
    "olmoe": specs.qwen,
    "flex_olmo": specs.qwen,
    "mellum": specs.qwen,
    "qwen3_5_moe_text": specs.qwen_renormed,
    "qwen3_vl_moe_text": specs.qwen_renormed,
    "jamba": specs.jamba,
    "hunyuan_v1_moe": specs.hunyuan,
    "granitemoe": specs.granite,
    "granitemoehybrid": specs.granite,
    "granitemoeshared": specs.granite,
    "granitemoe_swa": specs.granite,
    "aria_text": specs.aria,
    "gpt_oss": specs.gpt_oss,
    "cohere2_moe": specs.cohere2,
    "deepseek_v2": specs.deepseek_v2,
    "deepseek_v3": specs.deepseek_v3,
    "deepseek_v32": specs.deepseek_v3,
    "axk1": specs.deepseek_v3,
    "bailing_hybrid": specs.deepseek_v3,
    "dots1": specs.deepseek_v3,
    "dots3_note_text": specs.deepseek_v3,
    "glm4_moe": specs.deepseek_v3,
    "glm4_moe_lite": specs.deepseek_v3,
    "glm_moe_dsa": specs.deepseek_v3,
    "hy_v4": specs.deepseek_v3,
    "mimo_v2_flash": specs.deepseek_v3,
    "solar_open": specs.deepseek_v3,
    "exaone_moe": specs.exaone,
    "axk2": specs.axk2,
    "kimi_linear": specs.kimi_linear,
    "nemotron_h": specs.nemotron_h,
    "hy_v3": specs.hy_v3,
    "minimax_m2": specs.minimax_m2,
    "minimax_m3_vl_text": specs.minimax_m2,
    "afmoe": specs.afmoe,
    "ernie4_5_moe": specs.ernie,
    "flint": specs.flint,
    "kolibri1": specs.kolibri1,
    "laguna": specs.laguna,
    "lfm2_moe": specs.lfm2,
    "deepseek_v4": specs.deepseek_v4,
    "inkling2_text": specs.inkling2,
    "phimoe": specs.phimoe,
    "llama4_text": specs.llama4,
    "dbrx": specs.dbrx,
}

_WHY_NOT = {
    "diffusion_gemma_text": "its gate does not read what its experts read",
    "gemma4_text": "its gate does not read what its experts read",
    "inkling_text": "its routed and shared experts are weighted together",
    "jetmoe": "its attention is a mixture of experts, too",
    "longcat_flash": "some of its experts are identities without weights",
    "muse_spark_text": "its experts do not read what its gate reads",
    "nllb-moe": "its experts drop tokens above their capacity",
    "switch_transformers": "its experts drop tokens above their capacity",
    "zaya": "its gate carries state from layer to layer",
}
