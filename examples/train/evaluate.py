"""How good the demo model is on each domain, and how its experts share the work.

Shapes: W windows, S tokens in a sequence, T = W * S tokens, V vocabulary, L layers, E experts,
M domains.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import MixtralForCausalLM

WINDOWS_PER_FORWARD = 16


@dataclass(frozen=True)
class DomainResult:
    """One domain of the validation set."""

    loss: float
    """Mean cross-entropy in nats per token."""
    bits_per_byte: float
    """The same in bits per byte of text, which does not depend on the tokenizer."""
    expert_load: Tensor
    """[L, E], share of the layer's (token, expert) pairs that each expert gets; a row sums to 1."""


@torch.inference_mode()
def evaluate_domain(model: MixtralForCausalLM, ids_WS: Tensor, bytes_V: Tensor) -> DomainResult:
    """Loss and expert load over the windows of one domain."""
    loss_sum = 0.0
    counts_LE = torch.zeros(model.config.num_hidden_layers, model.config.num_local_experts)
    for chunk_WS in torch.split(ids_WS, WINDOWS_PER_FORWARD):
        output = model(input_ids=chunk_WS, output_router_logits=True)
        logits_TV = output.logits[:, :-1].flatten(0, 1)
        loss_sum += cross_entropy(logits_TV, chunk_WS[:, 1:].flatten(), reduction="sum").item()
        counts_LE += count_tokens(output.router_logits, model.config.num_experts_per_tok)
    predicted = ids_WS[:, 1:]
    bits = loss_sum / math.log(2)
    return DomainResult(
        loss=loss_sum / predicted.numel(),
        bits_per_byte=bits / bytes_V[predicted].sum().item(),
        expert_load=counts_LE / counts_LE.sum(dim=1, keepdim=True),
    )


def count_tokens(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """How many tokens choose each expert [L, E], from the router logits of each layer."""
    return torch.stack(
        [
            torch.bincount(logits_TE.topk(top_k).indices.flatten(), minlength=logits_TE.shape[1])
            for logits_TE in router_logits
        ]
    )


def load_cv(load_E: Tensor) -> float:
    """Standard deviation of the load over its mean; 0 = perfectly balanced."""
    return (load_E.std(correction=0) / load_E.mean()).item()


def min_fair_share_frac(load_LE: Tensor) -> float:
    """Load of the idlest expert of any layer, as a fraction of its fair share 1 / E."""
    return load_LE.min().item() * load_LE.shape[1]


def mutual_information_bits(load_ME: Tensor) -> float:
    """I(domain; expert), domains equally likely: from 0 (routing ignores them) to log2(M)."""
    mean_E = load_ME.mean(dim=0)
    ratio_ME = load_ME.clamp_min(1e-12) / mean_E.clamp_min(1e-12)
    return (load_ME * ratio_ME.log2()).sum(dim=1).mean().item()
