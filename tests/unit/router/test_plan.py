"""Which rows go where: every slot once, each expert's rows together, in transformers' order."""

from collections.abc import Callable, Mapping, Sequence
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.router.plan import Shipment, plan, slot_order, slots_by_expert, slots_of_call
from expertmesh.router.pools import Costs, Standing
from expertmesh.router.snapshot import Key
from expertmesh.router.waterfill import Shares, share_out
from expertmesh.runtime.errors import ExpertUnavailable

LAYER = 4
NUM_EXPERTS = 6
REPLICAS = ["a", "b", "c"]

# [T, K] expert ids, distinct within a token
ROUTINGS = st.integers(1, 4).flatmap(
    lambda top_k: st.lists(
        st.permutations(range(NUM_EXPERTS)).map(lambda ids: ids[:top_k]), min_size=1, max_size=12
    )
)
# expert -> its holders
HOLDERS = st.fixed_dictionaries(
    {
        (LAYER, expert): st.lists(
            st.sampled_from(REPLICAS), min_size=1, max_size=3, unique=True
        ).map(tuple)
        for expert in range(NUM_EXPERTS)
    }
)


def first_of(rows: Mapping[int, int], able: Mapping[int, Sequence[str]]) -> Shares:
    """A policy without a will."""
    return {expert: [(able[expert][0], count)] for expert, count in rows.items()}


def poured(seed: int, row_us: float = 300.0) -> Callable[..., Shares]:
    """The router's own policy, over idle replicas."""
    standing = Standing(Costs(row_us=row_us))
    return lambda rows, able: share_out(rows, able, lambda name: standing, Random(seed))


def shipments_for(
    experts_S: Sequence[int], holders: Mapping[Key, tuple[str, ...]]
) -> list[Shipment]:
    """The plan of one call whose slots come in their own order."""
    return plan(LAYER, slots_by_expert(experts_S, range(len(experts_S))), holders, first_of)


def experts_of(shipment: Shipment) -> list[int]:
    """The expert of each row of a shipment."""
    pairs = zip(shipment.experts, shipment.rows_per_expert, strict=True)
    return [expert for expert, num_rows in pairs for _ in range(num_rows)]


@settings(deadline=None)
@given(ROUTINGS, HOLDERS, st.sampled_from(["slot_sum", "eager"]), st.integers(0, 99))
def test_every_slot_goes_once_to_a_holder_of_its_expert(
    routing: list[list[int]], holders: dict[Key, tuple[str, ...]], mode: str, seed: int
) -> None:
    experts_TK = torch.tensor(routing)
    experts_S = experts_TK.reshape(-1).tolist()
    order = slot_order(experts_S, experts_TK, mode)  # type: ignore[arg-type]
    shipments = plan(LAYER, slots_by_expert(experts_S, order), holders, poured(seed))
    sent = [slot for shipment in shipments for slot in shipment.slots_R]
    assert sorted(sent) == list(range(len(experts_S)))
    assert len({shipment.replica for shipment in shipments}) == len(shipments)
    for shipment in shipments:
        assert shipment.experts == sorted(shipment.experts)
        assert experts_of(shipment) == [experts_S[slot] for slot in shipment.slots_R]
        ranks = [order.index(slot) for slot in shipment.slots_R]
        assert ranks == sorted(ranks, key=lambda rank: (experts_S[order[rank]], rank))
        for expert in shipment.experts:
            assert shipment.replica in holders[LAYER, expert]


def test_rows_of_one_replica_travel_together() -> None:
    holders: dict[Key, tuple[str, ...]] = {
        (LAYER, 0): ("a",),
        (LAYER, 1): ("b",),
        (LAYER, 2): ("a",),
        (LAYER + 1, 0): ("z",),
    }
    assert shipments_for([2, 1, 0, 2], holders) == [
        Shipment("a", [0, 2], [1, 2], [2, 0, 3]),
        Shipment("b", [1], [1], [1]),
    ]


def test_the_policy_is_told_rows_and_holders_if_there_is_a_choice() -> None:
    told: list[tuple[Mapping[int, int], Mapping[int, Sequence[str]]]] = []

    def share(rows: Mapping[int, int], able: Mapping[int, Sequence[str]]) -> Shares:
        told.append((rows, able))
        return {0: [("a", 1)], 1: [("b", 2), ("a", 1)]}

    holders: dict[Key, tuple[str, ...]] = {(LAYER, 0): ("a",), (LAYER, 1): ("a", "b")}
    slots = slots_by_expert([0, 1, 1, 1], range(4))
    assert plan(LAYER, slots, holders, share) == [
        Shipment("a", [0, 1], [1, 1], [0, 3]),
        Shipment("b", [1], [2], [1, 2]),
    ]
    assert told == [({0: 1, 1: 3}, {0: ("a",), 1: ("a", "b")})]
    plan(LAYER, slots_by_expert([0, 0], range(2)), holders, share)
    assert len(told) == 1, "nothing to choose"


def test_contacted_replicas_are_preferred() -> None:
    holders: dict[Key, tuple[str, ...]] = {(LAYER, 0): ("b",)}
    holders |= {(LAYER, e): ("a", "b", "c") for e in range(1, NUM_EXPERTS)}
    slots = slots_by_expert(list(range(NUM_EXPERTS)), range(NUM_EXPERTS))
    for seed in range(20):
        shipments = plan(LAYER, slots, holders, poured(seed, row_us=1.0))
        assert [shipment.replica for shipment in shipments] == ["b"]


@pytest.mark.parametrize("holders", [{}, {(LAYER, 3): ()}, {(LAYER + 1, 3): ("a",)}])
def test_an_expert_nobody_holds_is_named(holders: dict[Key, tuple[str, ...]]) -> None:
    with pytest.raises(ExpertUnavailable) as caught:
        shipments_for([0, 3], {(LAYER, 0): ("a",)} | holders)
    assert caught.value.message.startswith("layer 4, expert 3: no live replica holds it; ")
    assert caught.value.fields == {"layer": "4", "expert": "3"}


def test_slots_are_filed_by_ascending_expert_in_the_order_given() -> None:
    found = slots_by_expert([3, 0, 3, 1], [3, 2, 1, 0])
    assert list(found.items()) == [(0, [1]), (1, [3]), (3, [2, 0])]
    assert slots_by_expert([3, 0, 3, 1], [2]) == {3: [2]}


def test_the_eager_loop_goes_slot_by_slot() -> None:
    experts_TK = torch.tensor([[5, 1], [1, 2], [5, 1]])
    order = slot_order(experts_TK.reshape(-1).tolist(), experts_TK, "eager")
    assert order == [0, 2, 4, 1, 3, 5]
    slots = slots_by_expert(experts_TK.reshape(-1).tolist(), order)
    assert slots == {1: [2, 1, 5], 2: [3], 5: [0, 4]}, "as torch.where over a [K, T] mask"


@pytest.mark.parametrize("num_tokens", [1, 7, 400])
def test_the_grouped_product_goes_by_transformers_own_sort(num_tokens: int) -> None:
    random = torch.Generator().manual_seed(num_tokens)
    experts_TK = torch.rand(num_tokens, 8, generator=random).topk(3).indices
    order = slot_order(experts_TK.reshape(-1).tolist(), experts_TK, "slot_sum")
    # transformers.integrations.moe.grouped_mm_experts_forward
    assert order == torch.sort(experts_TK.reshape(-1)).indices.tolist()
    assert sorted(order) == list(range(num_tokens * 3))


@pytest.mark.parametrize("mode", ["slot_sum", "eager"])
@pytest.mark.parametrize("num_tokens", [1, 7, 16, 17, 400])
def test_cut_out_of_the_sort_or_filed_one_by_one_it_is_the_same(num_tokens: int, mode: str) -> None:
    random = torch.Generator().manual_seed(num_tokens)
    experts_TK = torch.rand(num_tokens, 8, generator=random).topk(3).indices
    experts_TK[experts_TK == 2] = 9  # one that nobody chose, between others
    experts_S = experts_TK.reshape(-1).tolist()
    slots = slots_of_call(experts_S, experts_TK, mode)  # type: ignore[arg-type]
    order = slot_order(experts_S, experts_TK, mode)  # type: ignore[arg-type]
    assert list(slots.items()) == list(slots_by_expert(experts_S, order).items())
