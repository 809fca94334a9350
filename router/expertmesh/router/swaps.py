"""Giving up costly experts for cheaper ones, within what each token may lose. Pure.

Twice: with tensors for many tokens, and with lists for few, for which a tensor operation takes as
long as all of it. Shapes: T tokens, E experts, K experts per token, R some of the tokens.
"""

import torch

from expertmesh.router.expert_costs import ExpertCosts

FEW_SLOTS = 32
"""Up to here lists are faster."""


class ManySwaps:
    """Starts from the gate's choice; `experts` is what has become of it.

    Args:
        budget: share of each token's mass that it may lose.
    """

    def __init__(
        self, mass_TE: torch.Tensor, exact_TK: torch.Tensor, costs: ExpertCosts, budget: float
    ) -> None:
        self._experts_TK = exact_TK.clone()
        self._costs = costs
        self._costs_E = torch.tensor(costs.costs_us, dtype=torch.float64)
        self._mass_TE = mass_TE
        mass_TK = mass_TE.gather(1, exact_TK)
        self._left_T = budget * mass_TK.sum(1)
        """Mass that each token may still lose."""
        largest_T1 = mass_TK.argmax(1, keepdim=True)
        self._largest_T = exact_TK.gather(1, largest_T1).squeeze(1)
        self._free_TE = torch.ones_like(mass_TE, dtype=torch.bool).scatter_(1, exact_TK, False)

    def experts(self) -> torch.Tensor:
        """[T, K] expert ids."""
        return self._experts_TK

    def give_up(self, expert: int) -> None:
        """Swap the expert for the largest cheaper ones, in the tokens that can afford it; if its
        weights are on no device, in all tokens or in none."""
        cheaper_E = self._costs_E < self._costs.below_us(expert)
        tokens_R, slots_R = (self._experts_TK == expert).nonzero(as_tuple=True)
        able_RE = self._free_TE[tokens_R] & cheaper_E
        best_R, other_R = self._mass_TE[tokens_R].masked_fill(~able_RE, -1.0).max(1)
        lost_R = self._mass_TE[tokens_R, expert] - best_R
        may_R = (best_R >= 0) & (lost_R <= self._left_T[tokens_R])
        may_R &= self._largest_T[tokens_R] != expert
        if not self._costs.resident[expert] and not bool(may_R.all()):
            return
        tokens_R, slots_R, other_R = tokens_R[may_R], slots_R[may_R], other_R[may_R]
        self._experts_TK[tokens_R, slots_R] = other_R
        self._left_T[tokens_R] -= lost_R[may_R].clamp(min=0)
        self._free_TE[tokens_R, other_R] = False


class FewSwaps:
    """The same, token by token."""

    def __init__(
        self, mass_TE: torch.Tensor, exact_TK: torch.Tensor, costs: ExpertCosts, budget: float
    ) -> None:
        self._exact_TK = exact_TK
        self._costs = costs
        self._mass: list[list[float]] = mass_TE.tolist()
        self._experts: list[list[int]] = exact_TK.tolist()
        self._taken = [set(own) for own in self._experts]
        """Chosen, or given up, by each token."""
        self._left = []
        self._largest = []
        for mass, own in zip(self._mass, self._experts, strict=True):
            self._left.append(budget * sum(mass[expert] for expert in own))
            self._largest.append(max(own, key=mass.__getitem__))
        self._is_changed = False

    def experts(self) -> torch.Tensor:
        """[T, K] expert ids; the very tensor of the gate's choice if nothing was given up."""
        return torch.tensor(self._experts) if self._is_changed else self._exact_TK

    def give_up(self, expert: int) -> None:
        """See `ManySwaps.give_up`."""
        below_us = self._costs.below_us(expert)
        costs_us = self._costs.costs_us
        cheaper = [other for other, cost_us in enumerate(costs_us) if cost_us < below_us]
        swaps = []
        for token, own in enumerate(self._experts):
            if expert not in own:
                continue
            if (other := self._affordable(token, expert, cheaper)) is not None:
                swaps.append((token, other))
            elif not self._costs.resident[expert]:
                return
        for token, other in swaps:
            self._swap(token, expert, other)

    def _affordable(self, token: int, expert: int, cheaper: list[int]) -> int | None:
        if expert == self._largest[token]:
            return None
        mass, taken = self._mass[token], self._taken[token]
        free = [other for other in cheaper if other not in taken]
        best = max(free, key=mass.__getitem__, default=None)
        if best is None or mass[expert] - mass[best] > self._left[token]:
            return None
        return best

    def _swap(self, token: int, expert: int, other: int) -> None:
        own, mass = self._experts[token], self._mass[token]
        own[own.index(expert)] = other
        self._left[token] -= max(0.0, mass[expert] - mass[other])
        self._taken[token].add(other)
        self._is_changed = True
