"""The recipe of the demo model: its architecture, its loss and the training loop.

Shapes: B sequences in a batch, S tokens in a sequence, T = B * S tokens, V vocabulary, E experts.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig, MixtralForCausalLM


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, but for the versions of the packages with the text."""

    seed: int = 0
    num_steps: int = 2200
    """Training length in steps, not seconds: a slow machine must arrive at the same model."""
    batch_size: int = 16
    sequence_tokens: int = 128
    max_tokens: int = 512
    """Longest context the config allows; beyond `sequence_tokens` the model has seen nothing."""
    vocab_size: int = 2048
    max_domain_chars: int = 4_000_000
    """Text taken from each domain; more is cut off so that no domain rules the tokenizer."""
    held_out_frac: float = 0.05
    """Documents of each domain kept for validation."""
    peak_learning_rate: float = 4e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    balance_coef: float = 0.02
    """Weight of the Switch balance loss; lower lets experts die, higher hinders specialisation."""
    z_coef: float = 1e-3
    """Weight of the router z-loss, which keeps router logits small and so bf16 routing stable."""


def build_model(recipe: Recipe, eos_token_id: int, pad_token_id: int) -> MixtralForCausalLM:
    """A randomly initialised Mixtral small enough for git: 4 layers of 8 experts, 2 per token."""
    config = MixtralConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=recipe.max_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        router_aux_loss_coef=recipe.balance_coef,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    torch.manual_seed(recipe.seed)
    return MixtralForCausalLM(config)


def train(model: MixtralForCausalLM, batches: Iterator[Tensor], recipe: Recipe) -> list[float]:
    """Train in place, print progress, and return the language-model loss of every step."""
    optimizer = _optimizer(model, recipe)
    losses: list[float] = []
    started_s = time.monotonic()
    model.train()
    for step in range(recipe.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        losses.append(_train_step(model, next(batches), optimizer, recipe))
        if (step + 1) % 50 == 0 or step + 1 == recipe.num_steps:
            _print_progress(losses, time.monotonic() - started_s, recipe)
    model.eval()
    return losses


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to 5 % of the peak."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.num_steps))
    return recipe.peak_learning_rate * warmup * (0.05 + 0.95 * cosine)


def balance_loss(router_logits_TE: Tensor, top_k: int) -> Tensor:
    """Switch loss of ONE layer, `top_k` when balanced.

    transformers' `load_balancing_loss_func` adds up all layers before it multiplies, so that the
    imbalance of one layer hides that of another and experts die under a perfect loss.
    """
    num_tokens, num_experts = router_logits_TE.shape
    probs_TE = router_logits_TE.softmax(dim=-1)
    chosen = probs_TE.topk(top_k).indices.flatten()
    load_E = torch.bincount(chosen, minlength=num_experts) / num_tokens
    return num_experts * (load_E * probs_TE.mean(dim=0)).sum()


def z_loss(router_logits_TE: Tensor) -> Tensor:
    """ST-MoE's penalty on large router logits."""
    return router_logits_TE.logsumexp(dim=-1).square().mean()


def _train_step(
    model: MixtralForCausalLM, ids_BS: Tensor, optimizer: torch.optim.Optimizer, recipe: Recipe
) -> float:
    output = model(input_ids=ids_BS, output_router_logits=True, use_cache=False)
    loss = cross_entropy(output.logits[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())
    top_k = model.config.num_experts_per_tok
    routing_losses = [
        recipe.balance_coef * balance_loss(logits_TE, top_k) + recipe.z_coef * z_loss(logits_TE)
        for logits_TE in output.router_logits
    ]
    total = loss + torch.stack(routing_losses).mean()
    total.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _optimizer(model: MixtralForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; norms are not decayed."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, betas=(0.9, 0.95), fused=True)


def _print_progress(losses: list[float], elapsed_s: float, recipe: Recipe) -> None:
    recent = losses[-50:]
    tokens = len(losses) * recipe.batch_size * recipe.sequence_tokens
    print(
        f"step {len(losses):5d}/{recipe.num_steps}  loss {sum(recent) / len(recent):.3f}  "
        f"{tokens / elapsed_s:.0f} tokens/s  {elapsed_s:.0f} s",
        flush=True,
    )
