"""Which experts a token gets when its caller accepts others than the gate's own choice. Pure.

The gate's choice is given up only where it pays: an expert is swapped if another one would be
computed noticeably sooner (its weights are on a device already, its replica has less to do), and
only while the token keeps enough of its gate mass. The largest expert always stays, and weights are
the true gate's. Shapes: T tokens, E experts, K experts per token, R some of the tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from expertmesh.router.expert_costs import ExpertCosts
from expertmesh.router.gate import Scored
from expertmesh.router.selection_options import SelectionOptions
from expertmesh.router.swaps import FEW_SLOTS, FewSwaps, ManySwaps
from expertmesh.runtime.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Selection:
    """The experts that were selected."""

    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    given_up_T: torch.Tensor
    """Share of the gate's own choice's mass that each token lost: 0 if it kept its choice."""


def select(scored: Scored, costs: ExpertCosts, options: SelectionOptions) -> Selection:
    """The experts for each token.

    "cache_prior" and "max_rank" are the policies of Skliar et al., "Mixture of Cache-Conditional
    Experts" (arXiv 2412.00099), here with costs in place of a cache and within the budget.

    Raises:
        InvalidInput: `top_k` or `max_rank` does not fit the model.
    """
    mass_TE = scored.mass()
    check_ranks(options, mass_TE.shape[1])
    own_k = scored.spec.top_k
    top_k = options.top_k or own_k
    exact_TK = scored.top(top_k)
    experts_TK = exact_TK
    if options.max_groups:
        experts_TK = _in_few_groups(scored.choice_TE, mass_TE, costs, options.max_groups, top_k)
    elif options.quality_budget:
        swapped_TK = _POLICIES[options.policy](scored, mass_TE, exact_TK, costs, options)
        if swapped_TK is not exact_TK:
            kept_T = mass_TE.gather(1, swapped_TK).sum(1)
            least_T = (1 - options.quality_budget) * mass_TE.gather(1, exact_TK).sum(1)
            experts_TK = torch.where((kept_T >= least_T)[:, None], swapped_TK, exact_TK)
    weights_TK = scored.weights(experts_TK)
    if experts_TK is exact_TK and top_k >= own_k:
        return Selection(experts_TK, weights_TK, torch.zeros(len(experts_TK)))
    reference_TK = exact_TK if top_k >= own_k else scored.top(own_k)
    given_up_T = 1 - mass_TE.gather(1, experts_TK).sum(1) / mass_TE.gather(1, reference_TK).sum(1)
    return Selection(experts_TK, weights_TK, given_up_T.clamp(min=0))


def check_ranks(options: SelectionOptions, num_experts: int) -> None:
    """Raises InvalidInput if the options want more experts than there are."""
    for name in ("top_k", "max_rank"):
        value = getattr(options, name)
        if value > num_experts:
            raise InvalidInput.of(
                f"selection.{name}", expected=f"0 to {num_experts}, the model's experts", got=value
            )


def _swap_within_budget(
    scored: Scored,
    mass_TE: torch.Tensor,
    exact_TK: torch.Tensor,
    costs: ExpertCosts,
    options: SelectionOptions,
) -> torch.Tensor:
    """Expert after expert, the costliest first.

    One that is not resident is given up by all tokens of the batch or by none: it is loaded for the
    first that keeps it.
    """
    cheap_us = costs.cheap_us
    chosen: set[int] = set(exact_TK.reshape(-1).tolist())
    costly = [own for own in chosen if costs.costs_us[own] > cheap_us]
    if not costly:
        return exact_TK
    costly.sort(key=lambda own: -costs.costs_us[own])
    few = exact_TK.numel() <= FEW_SLOTS
    swaps = (FewSwaps if few else ManySwaps)(mass_TE, exact_TK, costs, options.quality_budget)
    for expert in costly:
        swaps.give_up(expert)
    return swaps.experts()


def _with_bonus(
    scored: Scored,
    mass_TE: torch.Tensor,
    exact_TK: torch.Tensor,
    costs: ExpertCosts,
    options: SelectionOptions,
) -> torch.Tensor:
    """Cheap experts get a bonus on what they are ranked by."""
    finite_TE = scored.choice_TE.masked_fill(scored.choice_TE.isinf(), 0.0)
    range_T1 = finite_TE.amax(1, keepdim=True) - finite_TE.amin(1, keepdim=True)
    ranked_TE = scored.choice_TE + options.cache_prior * range_T1 * costs.cheap()
    return _top_with_largest(ranked_TE, mass_TE, exact_TK)


def _among_the_best(
    scored: Scored,
    mass_TE: torch.Tensor,
    exact_TK: torch.Tensor,
    costs: ExpertCosts,
    options: SelectionOptions,
) -> torch.Tensor:
    """Of the best `max_rank`, cheap ones before the others."""
    top_k = exact_TK.shape[1]
    most = min(options.max_rank or 2 * top_k, mass_TE.shape[1])
    ranks_TE = scored.choice_TE.argsort(1, descending=True).argsort(1)
    first_TE = (ranks_TE < max(most, top_k)) & costs.cheap()
    return _top_with_largest(mass_TE.shape[1] * first_TE - ranks_TE, mass_TE, exact_TK)


def _top_with_largest(
    ranked_TE: torch.Tensor, mass_TE: torch.Tensor, exact_TK: torch.Tensor
) -> torch.Tensor:
    """The best by rank, with the largest of the gate's own choice among them."""
    largest_T1 = exact_TK.gather(1, mass_TE.gather(1, exact_TK).argmax(1, keepdim=True))
    ranked_TE = ranked_TE.float().scatter(1, largest_T1, float("inf"))
    return ranked_TE.topk(exact_TK.shape[1], dim=1).indices


def _in_few_groups(
    choice_TE: torch.Tensor,
    mass_TE: torch.Tensor,
    costs: ExpertCosts,
    max_groups: int,
    top_k: int,
) -> torch.Tensor:
    """The best experts of the groups with the best ones; more groups if those have too few.

    Groups are ranked by the sum of their experts' scores among the token's best `top_k`.
    """
    names = sorted(set().union(*costs.groups))
    member_GE = torch.tensor([[name in own for own in costs.groups] for name in names])
    best_TK = choice_TE.topk(top_k, dim=1).indices
    worth_TE = torch.zeros_like(mass_TE).scatter_(1, best_TK, mass_TE.gather(1, best_TK))
    order_TG = (worth_TE @ member_GE.float().T).argsort(1, descending=True)
    sizes_TG = member_GE.sum(1)[order_TG].cumsum(1)
    needed_T1 = (sizes_TG < top_k).sum(1, keepdim=True) + 1
    count_T1 = needed_T1.clamp(min=max_groups)
    taken_TG = torch.zeros_like(order_TG, dtype=torch.bool).scatter_(
        1, order_TG, torch.arange(len(names)) < count_T1
    )
    allowed_TE = (taken_TG.float() @ member_GE.float()) > 0
    return choice_TE.masked_fill(~allowed_TE, float("-inf")).topk(top_k, dim=1).indices


_Policy = Callable[
    [Scored, torch.Tensor, torch.Tensor, ExpertCosts, SelectionOptions], torch.Tensor
]
_POLICIES: dict[str, _Policy] = {
    "budget": _swap_within_budget,
    "cache_prior": _with_bonus,
    "max_rank": _among_the_best,
}
