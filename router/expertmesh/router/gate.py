"""The gate: hidden states to expert ids and weights, bit-equal to the routers of transformers.

Shapes: T tokens, D hidden size, E experts, K experts per token, G groups of experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional

from expertmesh.router.routing_spec import RoutingSpec

ALIGNMENT_BYTES = 64
Picked = tuple[torch.Tensor, torch.Tensor]
"""weights_TK, experts_TK"""


@dataclass(frozen=True, eq=False)
class GateWeights:
    """The parameters of one layer's gate, each in the dtype transformers keeps it in."""

    weight_ED: torch.Tensor
    bias_E: torch.Tensor | None = None
    """Bias of the linear layer."""
    correction_E: torch.Tensor | None = None
    """Added to the scores for the choice only (DeepSeek-V3's e_score_correction_bias)."""

    @cached_property
    def weight_fp32_ED(self) -> torch.Tensor:
        """The weight in fp32, cast once: for one token the cast takes longer than the product."""
        return self.weight_ED.float()


@dataclass(frozen=True, eq=False)
class Routing:
    """What the gate decided for T tokens."""

    logits_TE: torch.Tensor
    """As the router of the family returns them: before any bias or grouping."""
    weights_TK: torch.Tensor
    """In fp32 or the model's dtype, as the family has it."""
    experts_TK: torch.Tensor
    """int64, distinct within a row, in the slot order that an exact combine needs."""


@dataclass(frozen=True, eq=False)
class Scored:
    """What a gate thinks of every expert, before any is chosen."""

    spec: RoutingSpec
    logits_TE: torch.Tensor
    choice_TE: torch.Tensor
    """Experts are ranked by it: the largest are chosen."""
    scores_TE: torch.Tensor | None
    """None if only the chosen ones are scored."""
    dtype: torch.dtype
    """Of the hidden states."""

    def top(self, top_k: int) -> torch.Tensor:
        """[T, top_k] ids of the best, as the family orders them."""
        sort = self.spec.topk_sorted
        return self.choice_TE.topk(top_k, dim=-1, sorted=sort).indices

    def weights(self, experts_TK: torch.Tensor) -> torch.Tensor:
        """The family's weights if these were the experts chosen: [T, K]."""
        spec = self.spec
        weights_TK = self._scores_of(experts_TK)
        if spec.renorm:
            weights_TK = weights_TK / _norm(spec, weights_TK)
        if spec.scale != 1.0:
            weights_TK = weights_TK * spec.scale
        return weights_TK.to(self.dtype) if spec.weights_dtype == "input" else weights_TK

    def _scores_of(self, experts_TK: torch.Tensor) -> torch.Tensor:
        spec = self.spec
        if self.scores_TE is not None:
            scores_TE = self.choice_TE if spec.weights_from_choice else self.scores_TE
            return scores_TE.gather(1, experts_TK)
        if spec.score_all:
            return _score(spec, self.logits_TE).gather(1, experts_TK)
        return _score(spec, self.logits_TE.gather(1, experts_TK))

    def mass(self) -> torch.Tensor:
        """How much each expert matters for a token, 0 or more: [T, E] in fp32."""
        if self.scores_TE is not None:
            return self.scores_TE.float()
        return _score(self.spec, self.logits_TE).float()


def route(spec: RoutingSpec, hidden_TD: torch.Tensor, gate: GateWeights) -> Routing:
    """Choose K experts and their weights for each token.

    Args:
        hidden_TD: in the model's dtype, as they enter the gate.
        gate: weights that fit `spec`, from `gate_weights.GateReader`.
    """
    if spec.select == "sparsemixer":
        logits_TE = _logits(spec, _aligned(hidden_TD), gate)
        weights_TK, experts_TK = _sparsemixer(spec, logits_TE)
        return Routing(logits_TE, weights_TK, experts_TK)
    scored = score(spec, hidden_TD, gate)
    experts_TK = scored.top(spec.top_k)
    return Routing(scored.logits_TE, scored.weights(experts_TK), experts_TK)


def score(spec: RoutingSpec, hidden_TD: torch.Tensor, gate: GateWeights) -> Scored:
    """What the gate thinks of every expert; not for sparsemixer, which picks one after the other.

    Args:
        hidden_TD, gate: as for `route`.
    """
    logits_TE = _logits(spec, _aligned(hidden_TD), gate)
    scores_TE = _score(spec, logits_TE) if spec.select == "scores" else None
    choice_TE = logits_TE if scores_TE is None else scores_TE
    if gate.correction_E is not None:
        choice_TE = choice_TE + gate.correction_E
    if scores_TE is not None and spec.is_grouped:
        choice_TE = choice_TE.masked_fill(~_in_best_groups(spec, choice_TE), spec.group_fill)
    return Scored(spec, logits_TE, choice_TE, scores_TE, hidden_TD.dtype)


def _aligned(hidden_TD: torch.Tensor) -> torch.Tensor:
    """As torch allocates tensors. Rows from the wire can lie anywhere, and MKL's fp32 product of
    two rows has other bits when they do not start on a multiple of 16 bytes."""
    return hidden_TD if hidden_TD.data_ptr() % ALIGNMENT_BYTES == 0 else hidden_TD.clone()


def _logits(spec: RoutingSpec, hidden_TD: torch.Tensor, gate: GateWeights) -> torch.Tensor:
    if spec.logits == "fp32":
        logits_TE = functional.linear(hidden_TD.float(), gate.weight_fp32_ED)
    else:
        logits_TE = functional.linear(hidden_TD, gate.weight_ED, gate.bias_E)
    if spec.logit_softcap:
        return torch.tanh(logits_TE.float() / spec.logit_softcap) * spec.logit_softcap
    return logits_TE


def _score(spec: RoutingSpec, logits: torch.Tensor) -> torch.Tensor:
    return _SCORE[spec.score](logits.float() if spec.score_dtype == "fp32" else logits)


def _sparsemixer(spec: RoutingSpec, logits_TE: torch.Tensor) -> Picked:
    """SparseMixer's inference rule (Liu et al., arXiv 2409.12136; transformers' modeling_phimoe).

    Each pick is the best of what is left, weighted by a softmax over the experts close to it.
    """
    left_TE = logits_TE
    picked: list[Picked] = []
    for _ in range(spec.top_k):
        best_T1, expert_T1 = left_TE.max(dim=-1, keepdim=True)
        distance_TE = (best_T1 - logits_TE) / logits_TE.abs().clamp(min=best_T1)
        is_far_TE = distance_TE > 2 * spec.jitter_eps
        scores_TE = left_TE.masked_fill(is_far_TE, float("-inf")).softmax(dim=-1)
        picked.append((scores_TE.gather(1, expert_T1), expert_T1))
        left_TE = left_TE.scatter(1, expert_T1, float("-inf"))
    weights, experts = zip(*picked, strict=True)
    return torch.cat(weights, dim=-1), torch.cat(experts, dim=-1)


def _in_best_groups(spec: RoutingSpec, choice_TE: torch.Tensor) -> torch.Tensor:
    """[T, E] bool: whether the expert is in one of the token's `topk_group` best groups."""
    group_size = spec.num_experts // spec.n_group
    choice_TGe = choice_TE.view(-1, spec.n_group, group_size)
    if spec.group_score == "max":
        rank_TG = choice_TGe.amax(dim=-1)
    else:
        rank_TG = choice_TGe.topk(2, dim=-1).values.sum(dim=-1)
    best = rank_TG.topk(spec.topk_group, dim=-1, sorted=False).indices
    is_best_TG = torch.zeros_like(rank_TG, dtype=torch.bool).scatter_(1, best, True)
    return is_best_TG.repeat_interleave(group_size, dim=1)


def _norm(spec: RoutingSpec, weights_TK: torch.Tensor) -> torch.Tensor:
    if spec.renorm_p is None:
        norm_T1 = weights_TK.sum(dim=-1, keepdim=True)
    else:
        norm_T1 = torch.linalg.vector_norm(weights_TK, spec.renorm_p, dim=-1, keepdim=True)
    if spec.renorm_eps:
        norm_T1 = norm_T1 + spec.renorm_eps
    return norm_T1.clamp(min=spec.renorm_min) if spec.renorm_min else norm_T1


_SCORE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: functional.softplus(logits).sqrt(),
}
