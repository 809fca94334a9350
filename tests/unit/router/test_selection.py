"""Selection within a quality budget: what is given up, what never is."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.router.expert_costs import ExpertCosts, expert_costs
from expertmesh.router.gate import GateWeights, Scored, route, score
from expertmesh.router.pools import Costs, Standing
from expertmesh.router.routing_spec import RoutingSpec
from expertmesh.router.selection import Selection, select
from expertmesh.router.selection_options import SelectionOptions
from expertmesh.router.swaps import FewSwaps, ManySwaps
from expertmesh.runtime.config import validate
from expertmesh.runtime.errors import ConfigError, InvalidInput

NUM_EXPERTS, TOP_K = 8, 2
SPECS = {
    "softmax": RoutingSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, renorm=True),
    "sigmoid": RoutingSpec(
        num_experts=NUM_EXPERTS, top_k=TOP_K, score="sigmoid", renorm=True, scale=2.5
    ),
    "logits": RoutingSpec(
        num_experts=NUM_EXPERTS, top_k=TOP_K, select="logits", weights_dtype="input"
    ),
    "grouped": RoutingSpec(
        num_experts=NUM_EXPERTS, top_k=TOP_K, n_group=4, topk_group=2, score="sigmoid"
    ),
}


def scored_from(logits: Sequence[Sequence[float]], spec: str = "softmax") -> Scored:
    """What a gate with these logits thinks."""
    logits_TE = torch.tensor(logits)
    return score(SPECS[spec], logits_TE, GateWeights(torch.eye(NUM_EXPERTS)))


def costing(*costly: int, cost_us: float = 5000.0, resident: bool = False) -> ExpertCosts:
    """All experts cost 100 us, but for some; each two make a group."""
    every = range(NUM_EXPERTS)
    return ExpertCosts(
        [cost_us if own in costly else 100.0 for own in every],
        [resident or own not in costly for own in every],
        [frozenset({f"g{own // 2}"}) for own in every],
    )


def chosen(selection: Selection) -> list[set[int]]:
    """The experts of each token."""
    return [set(own) for own in selection.experts_TK.tolist()]


ROW = [3.0, 2.0, 1.9, 0.0, -1.0, -1.0, -1.0, -1.0]
"""The best are 0 and 1; 2 is nearly as good as 1."""
OPTIONS = st.builds(
    SelectionOptions,
    quality_budget=st.floats(0, 0.99),
    policy=st.sampled_from(["budget", "cache_prior", "max_rank"]),
    cache_prior=st.floats(0, 3),
    max_rank=st.integers(0, NUM_EXPERTS),
    top_k=st.integers(0, NUM_EXPERTS),
)
LOGITS = st.lists(
    st.lists(st.floats(-5, 5, width=32), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS),
    min_size=1,
    max_size=9,
)


@settings(deadline=None)
@given(LOGITS, st.sampled_from(sorted(SPECS)), OPTIONS, st.sets(st.integers(0, 7)), st.booleans())
def test_the_budget_holds_and_the_largest_stays(
    logits: list[list[float]],
    spec: str,
    options: SelectionOptions,
    costly: set[int],
    resident: bool,
) -> None:
    scored = scored_from(logits, spec)
    selection = select(scored, costing(*costly, resident=resident), options)
    top_k = options.top_k or TOP_K
    assert selection.experts_TK.shape == (len(logits), top_k)
    assert all(len(own) == top_k for own in chosen(selection)), "no expert twice"
    exact_TK, mass_TE = scored.top(top_k), scored.mass()
    kept_T = mass_TE.gather(1, selection.experts_TK).sum(1)
    exact_T = mass_TE.gather(1, exact_TK).sum(1)
    assert bool((kept_T >= (1 - options.quality_budget) * exact_T).all())
    if torch.equal(selection.experts_TK, exact_TK):
        assert torch.equal(selection.weights_TK, scored.weights(exact_TK))
    for token, own in enumerate(exact_TK.tolist()):
        largest = max(own, key=lambda expert: float(mass_TE[token, expert]))
        best = [e for e in own if mass_TE[token, e] == mass_TE[token, largest]]
        assert set(best) & chosen(selection)[token], "the largest stays"


@settings(deadline=None)
@given(LOGITS, st.sampled_from(sorted(SPECS)), st.sets(st.integers(0, 7)))
def test_without_a_budget_the_gates_choice_comes_out_bit_for_bit(
    logits: list[list[float]], spec: str, costly: set[int]
) -> None:
    routing = route(SPECS[spec], torch.tensor(logits), GateWeights(torch.eye(NUM_EXPERTS)))
    selection = select(scored_from(logits, spec), costing(*costly), SelectionOptions())
    assert torch.equal(selection.experts_TK, routing.experts_TK)
    assert torch.equal(selection.weights_TK, routing.weights_TK)
    assert selection.given_up_T.tolist() == [0.0] * len(logits)


@pytest.mark.parametrize("policy", ["budget", "cache_prior", "max_rank"])
def test_a_costly_expert_is_swapped_for_the_next_best(policy: str) -> None:
    options = SelectionOptions(quality_budget=0.1, policy=policy, max_rank=3)  # type: ignore[arg-type]
    selection = select(scored_from([ROW]), costing(1), options)
    assert chosen(selection) == [{0, 2}]
    kept = (math.exp(3) + math.exp(1.9)) / (math.exp(3) + math.exp(2))
    assert float(selection.given_up_T) == pytest.approx(1 - kept, abs=1e-6)
    expected = [math.exp(own) / (math.exp(3) + math.exp(1.9)) for own in (3, 1.9)]
    assert sorted(selection.weights_TK[0].tolist(), reverse=True) == pytest.approx(expected)


def test_a_swap_beyond_the_budget_is_not_made() -> None:
    tight = SelectionOptions(quality_budget=0.01)
    assert chosen(select(scored_from([ROW]), costing(1), tight)) == [{0, 1}]
    assert chosen(select(scored_from([ROW]), costing(0), SelectionOptions(quality_budget=0.9))) == [
        {0, 1}
    ], "the largest stays, whatever it costs"


def test_a_swap_that_gains_little_is_not_made() -> None:
    options = SelectionOptions(quality_budget=0.5)
    assert chosen(select(scored_from([ROW]), costing(1, cost_us=250.0), options)) == [{0, 1}]


def test_an_expert_is_not_loaded_for_one_and_given_up_by_another() -> None:
    needs = [0.0, 5.0, 1.0, -9.0, -9.0, -9.0, -9.0, -9.0]
    options = SelectionOptions(quality_budget=0.1)
    both = select(scored_from([ROW, needs]), costing(1), options)
    assert chosen(both)[0] == {0, 1}, "loaded for the second token anyway"
    busy = select(scored_from([ROW, needs]), costing(1, resident=True), options)
    assert chosen(busy)[0] == {0, 2}, "a busy replica is helped by every row less"


def test_experts_that_nobody_holds_are_avoided_within_the_budget() -> None:
    costs = costing(1, cost_us=math.inf)
    assert chosen(select(scored_from([ROW]), costs, SelectionOptions(quality_budget=0.1))) == [
        {0, 2}
    ]


@pytest.mark.parametrize(("top_k", "experts"), [(1, {0}), (3, {0, 1, 2}), (0, {0, 1})])
def test_fewer_and_more_experts(top_k: int, experts: set[int]) -> None:
    selection = select(scored_from([ROW]), costing(), SelectionOptions(top_k=top_k))
    assert chosen(selection) == [experts]
    lost = math.exp(2) / (math.exp(3) + math.exp(2)) if top_k == 1 else 0.0
    assert float(selection.given_up_T) == pytest.approx(lost, abs=1e-6)


def test_few_groups() -> None:
    row = [3.0, -9.0, 2.9, 2.8, 2.7, -9.0, -9.0, -9.0]
    one = select(scored_from([row]), costing(), SelectionOptions(top_k=2, max_groups=1))
    assert chosen(one) == [{0, 1}] or chosen(one) == [{2, 3}]
    three = select(scored_from([row]), costing(), SelectionOptions(top_k=3, max_groups=1))
    assert len({own // 2 for own in chosen(three)[0]}) == 2, "one group has too few"
    every = select(scored_from([row]), costing(), SelectionOptions(max_groups=4))
    assert chosen(every) == [{0, 2}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quality_budget": 1.0}, "quality_budget: Input should be less than 1"),
        ({"quality_budget": -0.1}, "quality_budget: Input should be greater than or equal to 0"),
        ({"policy": "magic"}, "policy: Input should be 'budget', 'cache_prior' or 'max_rank'"),
        ({"top_k": -1}, "top_k: Input should be greater than or equal to 0"),
    ],
)
def test_options_out_of_range_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        validate(SelectionOptions, values)


@pytest.mark.parametrize("field", ["top_k", "max_rank"])
def test_more_experts_than_the_model_has(field: str) -> None:
    options = SelectionOptions(quality_budget=0.1).model_copy(update={field: 9})
    with pytest.raises(InvalidInput, match=rf"selection\.{field}: expected 0 to 8, .* got 9"):
        select(scored_from([ROW]), costing(), options)


def test_experts_cost_what_their_best_holder_takes() -> None:
    costs = Costs(batch_us=10, expert_us=5, row_us=1, load_us=1000)
    standings = {
        "a": Standing(costs, ready_us=100, resident=frozenset({0})),
        "b": Standing(costs, ready_us=500),
    }
    found = expert_costs([("a",), ("a",), ("a", "b"), ()], standings, {"a": "g0", "b": "g1"})
    assert found.costs_us == [116, 1116, 516, math.inf]
    assert found.resident == [True, False, True, False]
    assert [sorted(own) for own in found.groups] == [["g0"], ["g0"], ["g0", "g1"], []]


@settings(deadline=None)
@given(
    LOGITS,
    st.lists(st.sampled_from([100.0, 200.0, 3000.0, 9000.0]), min_size=8, max_size=8),
    st.lists(st.booleans(), min_size=8, max_size=8),
    st.floats(0, 0.9),
)
def test_few_and_many_tokens_are_swapped_alike(
    logits: list[list[float]], costs_us: list[float], resident: list[bool], budget: float
) -> None:
    scored = scored_from(logits)
    costs = ExpertCosts(costs_us, resident, [frozenset()] * NUM_EXPERTS)
    few, many = (
        kind(scored.mass().double(), scored.top(TOP_K), costs, budget)
        for kind in (FewSwaps, ManySwaps)
    )
    for expert in sorted(range(NUM_EXPERTS), key=lambda own: -costs_us[own]):
        few.give_up(expert)
        many.give_up(expert)
    assert torch.equal(few.experts(), many.experts())


def test_layers_may_have_budgets_of_their_own() -> None:
    options = SelectionOptions(quality_budget=0.2, layer_budgets=(0, 2, 9))
    budgets = [options.of_layer(layer).quality_budget for layer in range(4)]
    assert budgets[0] == 0
    assert budgets[1] == pytest.approx(0.4)
    assert 0.99 < budgets[2] < 1, "never all of it"
    assert budgets[3] == 0.2, "layers beyond the list"
    assert options.of_layer(0).is_exact


def test_no_budget_has_no_multiples() -> None:
    assert SelectionOptions(layer_budgets=(3.0,)).is_exact
    assert SelectionOptions(layer_budgets=(3.0,)).of_layer(0).is_exact


@pytest.mark.parametrize("multiples", [(-1.0,), (math.nan,), (math.inf,), (1.0,) * 1025])
def test_multiples_are_at_most_1024_numbers_from_0(multiples: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="layer_budgets"):
        validate(SelectionOptions, {"layer_budgets": multiples})
