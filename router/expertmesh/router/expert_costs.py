"""What a row through each expert of a layer would cost now. Pure.

E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import torch

from expertmesh.router.pools import Standing, row_us

SWAP_GAIN_US = 200.0
"""An expert is worth giving up only if another one is computed sooner by that much."""


@dataclass(frozen=True, eq=False)
class ExpertCosts:
    """What a layer's experts would cost now."""

    costs_us: Sequence[float]
    """Until a row could be answered, by expert; infinite if nobody holds it."""
    resident: Sequence[bool]
    """Whether some replica has its weights on the device: if not, all rows wait for one load."""
    groups: Sequence[frozenset[str]]
    """Expert groups that hold it."""

    def below_us(self, expert: int) -> float:
        """It pays to compute an expert instead of this one if it costs less than that: half, and
        SWAP_GAIN_US less."""
        cost_us = self.costs_us[expert]
        return min(cost_us - SWAP_GAIN_US, cost_us / 2)

    @property
    def cheap_us(self) -> float:
        """Up to here an expert is cheap: it pays to compute none instead."""
        least_us = min(self.costs_us)
        return max(least_us + SWAP_GAIN_US, 2 * least_us)

    def cheap(self) -> torch.Tensor:
        """[E] bool: the experts that are cheap."""
        most_us = self.cheap_us
        return torch.tensor([cost_us <= most_us for cost_us in self.costs_us])


def expert_costs(
    able: Sequence[Sequence[str]], standings: Mapping[str, Standing], groups: Mapping[str, str]
) -> ExpertCosts:
    """What a row through each expert would cost, at the replica that would have it first.

    Args:
        able: the holders of each expert.
        standings: of every holder.
        groups: the expert group of every holder.
    """
    costs, resident = [], []
    for expert, names in enumerate(able):
        own = [standings[name] for name in names]
        warm = [s.resident is None or expert in s.resident for s in own]
        costs.append(min((row_us(expert, standing) for standing in own), default=inf))
        resident.append(any(warm))
    held_by = [frozenset(groups[name] for name in names) for names in able]
    return ExpertCosts(costs, resident, held_by)
