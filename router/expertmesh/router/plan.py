"""Which rows go to which replica. Pure Python: for a few tokens lists beat tensor sorts.

T tokens, K experts per token, R rows. A slot is one (token, k) pair: slot = token * K + k.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from expertmesh.router.combine import CombineMode
from expertmesh.router.snapshot import Key
from expertmesh.runtime.errors import ExpertUnavailable

Choose = Callable[[Sequence[str], Mapping[str, object]], str]


@dataclass
class Shipment:
    """The rows of one call that go to one replica, sorted by expert."""

    replica: str
    experts: list[int] = field(default_factory=list)
    """Ascending."""
    rows_per_expert: list[int] = field(default_factory=list)
    slots_R: list[int] = field(default_factory=list)
    """Slots in the order of the shipment's rows."""


def slot_order(experts_TK: torch.Tensor, mode: CombineMode) -> list[int]:
    """All slots in the order in which transformers stacks the rows of an expert.

    The order matters for the bits: products treat the last few rows of a matrix differently. The
    grouped implementations sort the ids of all slots (and torch.sort is not stable), the eager
    loops go k by k.
    """
    num_tokens, top_k = experts_TK.shape
    if mode == "slot_sum":
        order: list[int] = torch.sort(experts_TK.reshape(-1)).indices.tolist()
        return order
    return [token * top_k + k for k in range(top_k) for token in range(num_tokens)]


def slots_by_expert(experts_S: Sequence[int], slots: Iterable[int]) -> dict[int, list[int]]:
    """Slots of each expert, experts ascending, slots in the order given.

    Args:
        experts_S: expert id of every slot (T * K).
        slots: those to file.
    """
    found: dict[int, list[int]] = {}
    for slot in slots:
        found.setdefault(experts_S[slot], []).append(slot)
    return dict(sorted(found.items()))


def plan(
    layer: int,
    slots: Mapping[int, Sequence[int]],
    holders: Mapping[Key, tuple[str, ...]],
    choose: Choose,
) -> list[Shipment]:
    """One shipment per replica; all rows of an expert go to one replica, so no GEMM is split.

    Args:
        slots: what `slots_by_expert` returns.
        holders: who can compute (layer, expert).
        choose: picks one of several holders, given the replicas already contacted.

    Raises:
        ExpertUnavailable: nobody holds one of the experts.
    """
    shipments: dict[str, Shipment] = {}
    for expert, own in slots.items():
        able = holders.get((layer, expert))
        if not able:
            raise ExpertUnavailable(
                f"layer {layer}, expert {expert}: no live replica holds it; "
                "see `expertmesh status` for the groups that are missing",
                layer=layer,
                expert=expert,
            )
        name = choose(able, shipments)
        shipment = shipments.setdefault(name, Shipment(name))
        shipment.experts.append(expert)
        shipment.rows_per_expert.append(len(own))
        shipment.slots_R.extend(own)
    return list(shipments.values())
