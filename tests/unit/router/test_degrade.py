"""Routings without missing experts: what is kept, what is replaced, what it has cost."""

import math
from collections.abc import Set
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.router.degrade import Asked, Reduced, reduce
from expertmesh.router.gate import GateWeights, Scored, score
from expertmesh.router.routing_spec import RoutingSpec
from expertmesh.runtime.missing_experts import POLICIES, Policy

NUM_EXPERTS = 8
SPECS = {
    "softmax": RoutingSpec(num_experts=NUM_EXPERTS, top_k=3, renorm=True),
    "raw": RoutingSpec(num_experts=NUM_EXPERTS, top_k=3),
    "sigmoid": RoutingSpec(
        num_experts=NUM_EXPERTS, top_k=3, score="sigmoid", renorm=True, scale=2.5
    ),
    "logits": RoutingSpec(num_experts=NUM_EXPERTS, top_k=3, select="logits"),
    "grouped": RoutingSpec(
        num_experts=NUM_EXPERTS, top_k=3, n_group=4, topk_group=2, score="sigmoid"
    ),
    "narrow": RoutingSpec(
        num_experts=NUM_EXPERTS, top_k=3, renorm=True, weights_dtype="input", topk_sorted=False
    ),
}
LENIENT: tuple[Policy, ...] = ("substitute", "renormalise")


def gated(
    logits: list[list[float]], spec: str = "softmax", dtype: torch.dtype = torch.float32
) -> Scored:
    """What a gate with these logits thinks."""
    return score(
        SPECS[spec],
        torch.tensor(logits).to(dtype),
        GateWeights(torch.eye(NUM_EXPERTS, dtype=dtype)),
    )


def asked_of(scored: Scored, policy: Policy) -> Asked:
    """The gate's own choice."""
    experts_TK = scored.top(scored.spec.top_k)
    return Asked(experts_TK, scored.weights(experts_TK), policy, lambda: scored)


ROW = [3.0, 2.5, 2.0, 1.0, 0.5, -1.0, -2.0, -3.0]
"""Chooses 0, 1 and 2; next are 3 and 4."""
LOGITS = st.lists(
    st.lists(st.floats(-30, 30, width=32), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS),
    min_size=1,
    max_size=5,
)
DEAD = st.sets(st.integers(0, NUM_EXPERTS - 1), max_size=NUM_EXPERTS)


def one(policy: Policy, dead: Set[int], spec: str = "softmax") -> Reduced:
    return reduce(asked_of(gated([ROW], spec), policy), dead)


def test_weights_of_the_living_are_scaled_so_that_their_sum_stays() -> None:
    asked = Asked(torch.tensor([[4, 1, 7]]), torch.tensor([[0.5, 0.3, 0.2]]), "renormalise")
    reduced = reduce(asked, {1, 2})
    assert reduced.experts_TK.tolist() == [[4, 1, 7]], "the order of ids decides bits"
    assert reduced.told_experts().tolist() == [[4, -1, 7]]
    torch.testing.assert_close(reduced.weights_TK, torch.tensor([[0.5 / 0.7, 0.0, 0.2 / 0.7]]))
    assert reduced.degraded_mass_T.tolist() == pytest.approx([0.3])
    assert not reduced.lost_T.any()


def test_the_next_best_living_expert_takes_the_place() -> None:
    reduced = one("substitute", {1, 3})
    assert reduced.told_experts().tolist() == [[0, 4, 2]]
    scores_E = torch.tensor(ROW).softmax(0)
    own_K = scores_E[[0, 4, 2]] / scores_E[[0, 4, 2]].sum()
    torch.testing.assert_close(reduced.weights_TK, own_K[None])
    of_the_gate = scores_E[[0, 1, 2]]
    assert reduced.degraded_mass_T.tolist() == pytest.approx(
        [float(of_the_gate[1] / of_the_gate.sum())]
    )


def test_several_missing_ones_get_the_best_in_their_order() -> None:
    assert one("substitute", {0, 2}).told_experts().tolist() == [[3, 1, 4]]


def test_without_enough_others_the_rest_is_renormalised() -> None:
    reduced = one("substitute", {1, 2, 3, 4, 5, 6})
    assert reduced.told_experts().tolist() == [[0, 7, -1]]
    assert float(reduced.weights_TK.sum()) == pytest.approx(1.0)
    assert float(reduced.weights_TK[0, 2]) == 0.0


def test_substitutes_come_from_the_groups_the_gate_chose_first() -> None:
    row = [3.0, -1.0, 2.0, -2.0, 2.5, 0.0, -3.0, -3.0]
    scored = gated([row], "grouped")
    [own] = scored.top(3).tolist()
    assert sorted(own) == [0, 4, 5], "groups 0-1 and 4-5"
    reduced = reduce(asked_of(scored, "substitute"), {4})
    assert sorted(reduced.told_experts()[0].tolist()) == [0, 1, 5]
    reduced = reduce(asked_of(scored, "substitute"), {1, 4, 5})
    assert sorted(reduced.told_experts()[0].tolist()) == [0, 2, 3], "2 is outside"


def test_a_token_without_a_living_expert_is_lost() -> None:
    asked = Asked(torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.5), "renormalise")
    assert reduce(asked, {2, 3}).lost_T.tolist() == [False, True]


def test_a_token_whose_living_experts_have_no_weight_is_lost() -> None:
    asked = Asked(
        torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]]), "renormalise"
    )
    reduced = reduce(asked, {1})
    assert reduced.lost_T.tolist() == [True, False]
    assert reduced.weights_TK.isfinite().all()


@pytest.mark.parametrize("weight", [math.inf, math.nan, -1.0, 3e38])
def test_the_mass_is_a_share_whatever_the_weights_are(weight: float) -> None:
    asked = Asked(
        torch.tensor([[0, 1], [2, 3]]), torch.tensor([[weight, 1.0], [weight, 1.0]]), "renormalise"
    )
    broken, exact = reduce(asked, {0}).degraded_mass_T.tolist()
    assert 0 < broken <= 1
    assert exact == 0


def test_a_small_rest_is_scaled_up_without_overflow() -> None:
    asked = Asked(torch.tensor([[0, 1]]), torch.tensor([[1.0, 1e-40]]), "renormalise")
    reduced = reduce(asked, {0})
    assert reduced.weights_TK.tolist() == [[0.0, pytest.approx(1.0)]]


@settings(max_examples=150, deadline=None)
@given(LOGITS, DEAD, st.sampled_from(sorted(SPECS)), st.sampled_from(LENIENT))
def test_what_holds_for_any_routing(
    logits: list[list[float]], dead: set[int], spec: str, policy: Policy
) -> None:
    dtype = torch.bfloat16 if spec == "narrow" else torch.float32
    scored = gated(logits, spec, dtype)
    asked = asked_of(scored, policy)
    reduced = reduce(asked, dead)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert reduced.weights_TK.dtype == asked.weights_TK.dtype
    assert reduced.weights_TK.isfinite().all()
    for token, told in enumerate(reduced.told_experts().tolist()):
        ids, weights = asked.experts_TK[token].tolist(), asked.weights_TK[token].double()
        gone = torch.tensor([own in dead for own in ids])
        used = [own for own in told if own >= 0]
        assert not dead.intersection(used)
        assert len(set(used)) == len(used)
        assert set(ids) - dead <= set(used), "living experts stay, the largest among them"
        share = float(weights[gone].sum() / weights.sum()) if weights.sum() else 0.0
        assert float(reduced.degraded_mass_T[token]) == pytest.approx(share, abs=1e-6)
        if not gone.any():
            assert torch.equal(reduced.weights_TK[token], asked.weights_TK[token])
        if policy == "renormalise":
            assert used == [own for own in ids if own not in dead]
            if not reduced.lost_T[token]:
                total = float(reduced.weights_TK[token].double().sum())
                assert total == pytest.approx(float(weights.sum()), rel=tolerance)
        elif -1 not in told and gone.any():
            own_K = scored.weights(reduced.experts_TK[token : token + 1].expand(len(logits), -1))[
                token
            ]
            torch.testing.assert_close(reduced.weights_TK[token], own_K.to(asked.weights_TK.dtype))


@given(LOGITS, st.sampled_from(POLICIES))
def test_nothing_changes_where_nothing_is_missing(
    logits: list[list[float]], policy: Policy
) -> None:
    asked = asked_of(gated(logits), policy)
    reduced = reduce(asked, set())
    assert reduced.experts_TK is asked.experts_TK
    assert reduced.weights_TK is asked.weights_TK
    assert not reduced.degraded_mass_T.any()
    assert not reduced.gone_TK.any()


def test_the_gate_is_asked_only_when_something_is_missing() -> None:
    def never() -> Scored:
        raise AssertionError("asked")

    asked = replace(asked_of(gated([ROW]), "substitute"), scored=never)
    reduce(asked, {7})
    with pytest.raises(AssertionError, match="asked"):
        reduce(asked, {0})


def test_ids_of_32_bits() -> None:
    asked = asked_of(gated([ROW]), "substitute")
    narrow = replace(asked, experts_TK=asked.experts_TK.int())
    reduced = reduce(narrow, {1})
    assert reduced.told_experts().tolist() == [[0, 3, 2]]
    assert reduced.experts_TK.dtype == torch.int32
