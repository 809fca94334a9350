"""Which rows go to which replica. Pure Python: for a few tokens lists beat tensor sorts.

T tokens, K experts per token, R rows. A slot is one (token, k) pair: slot = token * K + k.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from expertmesh.router.combine import CombineMode
from expertmesh.router.snapshot import Key
from expertmesh.router.waterfill import Shares
from expertmesh.runtime.errors import ExpertUnavailable

_FEW_SLOTS = 48
"""Up to here Python files them faster than torch counts them."""
Share = Callable[[Mapping[int, int], Mapping[int, Sequence[str]]], Shares]
"""(rows of each expert, its holders) -> which of them get how many; see `waterfill.share_out`."""


@dataclass(slots=True)
class Shipment:
    """The rows of one call that go to one replica, sorted by expert."""

    replica: str
    experts: list[int] = field(default_factory=list)
    """Ascending."""
    rows_per_expert: list[int] = field(default_factory=list)
    slots_R: list[int] = field(default_factory=list)
    """Slots in the order of the shipment's rows."""


def slot_order(experts_S: Sequence[int], experts_TK: torch.Tensor, mode: CombineMode) -> list[int]:
    """All slots in the order in which transformers stacks the rows of an expert.

    The order matters for the bits: products treat the last few rows of a matrix differently. The
    grouped implementations sort the ids of all slots (and torch.sort is not stable), the eager
    loops go k by k.

    Args:
        experts_S: the values of `experts_TK`, slot by slot.
    """
    num_tokens, top_k = experts_TK.shape
    if mode == "slot_sum":
        if num_tokens == 1 and len(set(experts_S)) == top_k:  # nothing to be unstable about
            return sorted(range(top_k), key=experts_S.__getitem__)
        order: list[int] = torch.sort(experts_TK.reshape(-1)).indices.tolist()
        return order
    return [token * top_k + k for k in range(top_k) for token in range(num_tokens)]


def slots_of_call(
    experts_S: Sequence[int], experts_TK: torch.Tensor, mode: CombineMode
) -> dict[int, list[int]]:
    """As `slots_by_expert` of `slot_order`. Where that is torch's sort, which has the slots expert
    after expert already, they are cut out of it: 20 us in place of 40 for 512 slots.

    Args:
        experts_S: the values of `experts_TK`, slot by slot.
    """
    order = slot_order(experts_S, experts_TK, mode)
    if mode != "slot_sum" or len(order) <= _FEW_SLOTS:
        return slots_by_expert(experts_S, order)
    found: dict[int, list[int]] = {}
    start = 0
    for expert, count in enumerate(torch.bincount(experts_TK.reshape(-1)).tolist()):
        if count:
            found[expert] = order[start : start + count]
            start += count
    return found


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
    share: Share,
) -> list[Shipment]:
    """One shipment per replica.

    Args:
        slots: what `slots_by_expert` returns.
        holders: who can compute (layer, expert).
        share: tells whose rows go where if some expert has several holders.

    Raises:
        ExpertUnavailable: nobody holds one of the experts.
    """
    able: dict[int, tuple[str, ...]] = {}
    has_choice = False
    for expert in slots:
        names = able[expert] = _able(layer, expert, holders)
        has_choice = has_choice or len(names) > 1
    shipments: dict[str, Shipment] = {}
    if not has_choice:
        for expert, own in slots.items():
            _add(shipments, able[expert][0], expert, own)
        return list(shipments.values())
    shares = share({expert: len(own) for expert, own in slots.items()}, able)
    for expert, own in slots.items():
        start = 0
        for name, count in shares[expert]:
            _add(shipments, name, expert, own[start : start + count])
            start += count
    return list(shipments.values())


def _able(layer: int, expert: int, holders: Mapping[Key, tuple[str, ...]]) -> tuple[str, ...]:
    able = holders.get((layer, expert))
    if able:
        return able
    raise ExpertUnavailable(
        f"layer {layer}, expert {expert}: no live replica holds it; "
        "see `expertmesh status` for the groups that are missing",
        layer=layer,
        expert=expert,
    )


def _add(shipments: dict[str, Shipment], name: str, expert: int, slots: Sequence[int]) -> None:
    shipment = shipments.get(name)
    if shipment is None:
        shipment = shipments[name] = Shipment(name)
    shipment.experts.append(expert)
    shipment.rows_per_expert.append(len(slots))
    shipment.slots_R.extend(slots)
