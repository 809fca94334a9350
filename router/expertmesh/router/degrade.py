"""What becomes of a routing whose experts are not all there, as far as its caller allows. Pure.

Shapes: T tokens, E experts, K experts per token.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass

import torch

from expertmesh.router.gate import Scored
from expertmesh.runtime.missing_experts import Policy
from expertmesh.runtime.origin import ANYONE, Origin

_NEVER = float("-inf")


@dataclass(frozen=True, eq=False)
class Asked:
    """A routing, what its caller allows where experts are missing, and who that is."""

    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    policy: Policy = "strict"
    scored: Callable[[], Scored] | None = None
    """The true gate's opinion of all experts; "substitute" asks for it when experts are missing."""
    origin: Origin = ANYONE


@dataclass(frozen=True, eq=False)
class Reduced:
    """A routing that needs live experts only."""

    experts_TK: torch.Tensor
    """Ids as asked for, or of substitutes; where `gone_TK`, that of the missing expert."""
    weights_TK: torch.Tensor
    """0 where `gone_TK`."""
    gone_TK: torch.Tensor
    """bool: slots that are not computed."""
    mended_TK: torch.Tensor
    """bool: slots of substitutes."""
    degraded_mass_T: torch.Tensor
    """float32: share of a token's weights, as asked for, that was for missing experts."""

    @property
    def is_degraded(self) -> bool:
        """Whether it differs from what was asked for."""
        return bool((self.gone_TK | self.mended_TK).any())

    @property
    def lost_T(self) -> torch.Tensor:
        """bool: tokens of which nothing is left to sum."""
        nothing_T = (self.weights_TK == 0).all(1) & (self.degraded_mass_T > 0)
        return nothing_T | self.gone_TK.all(1)

    def told_experts(self) -> torch.Tensor:
        """[T, K] as callers are told: -1 where nothing is computed."""
        return self.experts_TK.masked_fill(self.gone_TK, -1)


def reduce(asked: Asked, dead: Set[int]) -> Reduced:
    """The routing without the experts of the layer that nobody can compute.

    Tokens whose experts are all alive keep their ids and weights, bit for bit; the others keep
    their live experts. With "substitute" a missing one is replaced by the next-best live expert in
    the gate's order (first of the groups of experts it chose, if it limits them), and the weights
    are those the gate gives to that set. Where none is left, and with "renormalise", the weights of
    the live ones are scaled so that the sum of their magnitudes stays.
    """
    gone_TK = torch.isin(asked.experts_TK, torch.tensor(sorted(dead), dtype=torch.int64))
    mass_T = _mass_of(asked.weights_TK, gone_TK)
    if not bool(gone_TK.any()):
        return Reduced(asked.experts_TK, asked.weights_TK, gone_TK, gone_TK, mass_T)
    experts_TK, weights_TK = asked.experts_TK, asked.weights_TK
    mended_TK = torch.zeros_like(gone_TK)
    if asked.policy == "substitute" and asked.scored is not None:
        experts_TK, weights_TK, mended_TK = _substituted(asked, asked.scored(), dead, gone_TK)
        gone_TK = gone_TK & ~mended_TK
    return Reduced(experts_TK, _renormalised(weights_TK, gone_TK), gone_TK, mended_TK, mass_T)


def _mass_of(weights_TK: torch.Tensor, gone_TK: torch.Tensor) -> torch.Tensor:
    """[T] float32: share of the weights' magnitude in these slots, 0 to 1, never NaN."""
    size_TK = weights_TK.double().abs()
    gone_T = size_TK.masked_fill(~gone_TK, 0.0).sum(1)
    share_T = gone_T / size_TK.sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    share_T = share_T.nan_to_num(1.0).clamp(0.0, 1.0).float()  # weights may be anything
    return share_T.masked_fill(~gone_TK.any(1), 0.0)


def _renormalised(weights_TK: torch.Tensor, gone_TK: torch.Tensor) -> torch.Tensor:
    """Zero in these slots, the others of the same token scaled up."""
    size_TK = weights_TK.double().abs()  # as wide as it gets: a small rest is scaled up a lot
    left_T1 = size_TK.masked_fill(gone_TK, 0.0).sum(1, keepdim=True)
    factor_T1 = (size_TK.sum(1, keepdim=True) / left_T1).masked_fill(~(left_T1 > 0), 1.0)
    scaled_TK = (weights_TK.double() * factor_T1).to(weights_TK.dtype).masked_fill(gone_TK, 0.0)
    return torch.where(gone_TK.any(1, keepdim=True), scaled_TK, weights_TK)


def _substituted(
    asked: Asked, scored: Scored, dead: Set[int], gone_TK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(experts_TK, weights_TK, the slots of substitutes)."""
    ranked_TE = _ranked(scored)
    ranked_TE[:, sorted(dead)] = _NEVER
    ranked_TE = ranked_TE.scatter(1, asked.experts_TK.long(), _NEVER)
    order_TE = ranked_TE.argsort(stable=True, dim=1, descending=True)
    nth_TK = (gone_TK.cumsum(1) - 1).clamp(min=0)  # the token's nth missing one gets its nth best
    other_TK = order_TE.gather(1, nth_TK)
    mended_TK = gone_TK & (ranked_TE.gather(1, other_TK) > _NEVER)
    experts_TK = torch.where(mended_TK, other_TK.to(asked.experts_TK.dtype), asked.experts_TK)
    own_TK = scored.weights(experts_TK.long()).to(asked.weights_TK.dtype)
    weights_TK = torch.where(mended_TK.any(1, keepdim=True), own_TK, asked.weights_TK)
    return experts_TK, weights_TK, mended_TK


def _ranked(scored: Scored) -> torch.Tensor:
    """[T, E] float64: the larger, the sooner chosen; `_NEVER` for experts that the gate gives no
    weight. If it limits groups, those of other groups come after all of the groups it chose."""
    mass_TE, ranked_TE = scored.mass().double(), scored.choice_TE.double()
    if scored.spec.is_grouped:
        outside_TE = ranked_TE == scored.spec.group_fill
        least_T1 = ranked_TE.masked_fill(outside_TE, float("inf")).amin(1, keepdim=True)
        after_TE = least_T1 - 1 - (mass_TE.amax(1, keepdim=True) - mass_TE)
        weightless = scored.spec.weights_from_choice
        ranked_TE = torch.where(outside_TE, _NEVER if weightless else after_TE, ranked_TE)
    return torch.where(ranked_TE.isfinite() & (mass_TE > 0), ranked_TE, _NEVER)
