"""transformers' own expert modules beside ours: weights by expert, outputs bit for bit, and tiny
models of the families beyond `tests.checkpoints.FAMILIES`.

Shapes: T tokens, D hidden size, E experts.
"""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from expertmesh.experts.ffn import ExpertFFN
from expertmesh.experts.reader import ExpertReader
from expertmesh.runtime.checkpoint import Checkpoint

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

_LAYER = re.compile(r"(?:layers|blocks)\.(\d+)\.(?:.+\.)?experts$")

# whatever a family calls its sizes; a config takes the names it knows
_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 1,
}
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "nemotron_h": {"hybrid_override_pattern": "*E", "moe_shared_expert_intermediate_size": 48},
    "qwen3_next": {
        "decoder_sparse_step": 1,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    },
}


def other_checkpoint(model_type: str, directory: Path) -> Path:
    """A tiny float32 checkpoint of a supported family that is not in FAMILIES."""
    torch.manual_seed(0)
    known = AutoConfig.for_model(model_type)
    names = set(known.to_dict()) | set(known.attribute_map)
    sizes = {name: size for name, size in _SIZES.items() if name in names}
    for alias, name in known.attribute_map.items():
        if alias in sizes and name in sizes:
            del sizes[alias]
    config = AutoConfig.for_model(model_type, **(sizes | _OWN_SIZES.get(model_type, {})))
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def load_model(path: Path, dtype: torch.dtype, **options: Any) -> Any:
    """The checkpoint as transformers loads it by default."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options).eval()


def expert_modules(model: Any) -> dict[int, Any]:
    """Layer -> the module that holds its routed experts."""
    found = ((_LAYER.search(name), module) for name, module in model.named_modules())
    return {
        int(match[1]): module
        for match, module in found
        if match and not isinstance(module, torch.nn.ModuleList)
    }


def expert_weights(module: Any, expert: int) -> dict[str, torch.Tensor]:
    """One expert of a transformers module, weights [out, in], named as in ExpertTensors."""
    if hasattr(module, "mlp"):
        return _stacked_weights(module, expert)
    transposed = getattr(module, "is_transposed", not hasattr(module, "has_gate"))
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters(recurse=False):
        own = parameter[expert].detach()
        own = own.t() if transposed and own.dim() == 2 else own
        suffix = "_bias" if name.endswith("_bias") else ""
        if name.startswith("gate_up"):
            interleaved = not getattr(module, "is_concatenated", True)
            gate, up = (own[::2], own[1::2]) if interleaved else own.chunk(2)
            weights |= {f"gate{suffix}": gate, f"up{suffix}": up}
        else:
            weights[f"{name.split('_')[0]}{suffix}"] = own
    return weights


def _stacked_weights(module: Any, expert: int) -> dict[str, torch.Tensor]:
    """DBRX: [E * F, D] matrices."""
    shape = (-1, module.ffn_hidden_size, module.hidden_size)
    gate, up, down = (
        getattr(module.mlp, name).detach().view(shape)[expert] for name in ("w1", "v1", "w2")
    )
    return {"gate": gate, "up": up, "down": down.t()}


def num_experts(module: Any) -> int:
    """Routed experts in a module."""
    return int(module.num_experts)


def load_ffn(path: Path, layer: int, dtype: torch.dtype) -> ExpertFFN:
    reader = ExpertReader(Checkpoint.open(path))
    held = range(reader.num_experts(layer))
    return ExpertFFN.load(reader, layer, held, reader.spec, dtype)


def run(
    ffn: ExpertFFN, hidden_TD: torch.Tensor, experts_T: torch.Tensor, *, in_sort_order: bool = True
) -> torch.Tensor:
    """The output of one expert for each token, by way of rows sorted by expert: [T, D].

    The order within an expert is transformers' (torch.sort, not stable): with several threads the
    bits of a float32 product depend on where a row lies.
    """
    order = (
        torch.sort(experts_T).indices if in_sort_order else torch.argsort(experts_T, stable=True)
    )
    experts, counts = torch.unique_consecutive(experts_T[order], return_counts=True)
    out_TD = torch.empty_like(hidden_TD)
    out_TD[order] = ffn.forward(hidden_TD[order], experts.tolist(), counts.tolist())
    return out_TD


def reference(module: Any, hidden_TD: torch.Tensor, experts_T: torch.Tensor) -> torch.Tensor:
    """The same by transformers' module: one slot per token with a weight of one: [T, D]."""
    ones = torch.ones_like(hidden_TD[:, :1])
    rows_TD: torch.Tensor = module(hidden_TD, experts_T[:, None], ones)
    return rows_TD.view_as(hidden_TD)


def reference_dense(module: Any, hidden_TD: torch.Tensor) -> torch.Tensor:
    """Llama 4's module takes every token through every expert: [E, T, D]."""
    everything: torch.Tensor = module(hidden_TD.repeat(module.num_experts, 1))
    return everything.view(module.num_experts, *hidden_TD.shape)


def assert_bit_equal(path: Path, dtype: torch.dtype) -> None:
    for layer, module in expert_modules(load_model(path, dtype)).items():
        ffn = load_ffn(path, layer, dtype)
        in_sort_order = hasattr(module, "has_gate")  # the eager module of DBRX keeps token order
        for num_tokens in (1, 5, 37):
            hidden_TD = torch.randn(num_tokens, ffn.shape.hidden_size).to(dtype)
            experts_T = torch.randint(num_experts(module), (num_tokens,))
            with torch.inference_mode():
                expected = reference(module, hidden_TD, experts_T)
            got = run(ffn, hidden_TD, experts_T, in_sort_order=in_sort_order)
            assert torch.equal(got, expected), (layer, num_tokens)
