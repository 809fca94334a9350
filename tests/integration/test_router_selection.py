"""Selection and its explanation through a real router: what is asked, given, given up and told."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from tests.mesh import MakeCheckpoint, Mesh, Router, stalled
from tests.packing import random_hidden
from tests.router_caller import RouterCaller, refusal
from tests.waiting import until

from expertmesh.runtime.errors import ConfigError, InvalidInput
from expertmesh.runtime.tensors import from_proto, to_proto
from expertmesh.services.settings import SelectionSettings
from expertmesh.v1 import router_pb2

TOKENS = 6


@pytest.fixture
async def router(mesh: Mesh, checkpoint: MakeCheckpoint) -> Router:
    """Of a mixtral in four groups."""
    path = checkpoint("mixtral")
    await mesh.replicas(path, 4)
    return await mesh.router(path)


@pytest.fixture
async def caller(router: Router) -> AsyncIterator[RouterCaller]:
    async with RouterCaller(router.target) as own:
        yield own


def forward_request(**selection: Any) -> router_pb2.ForwardRequest:
    """For the same tokens each time."""
    options = router_pb2.SelectionOptions(**selection) if selection else None
    return router_pb2.ForwardRequest(
        layer=0, hidden=to_proto(random_hidden(TOKENS)), return_routing=True, selection=options
    )


async def _forward(caller: RouterCaller, **selection: Any) -> router_pb2.ForwardResponse:
    response: router_pb2.ForwardResponse = await caller.router.Forward(forward_request(**selection))
    return response


def explain_request(num_tokens: int = TOKENS, **selection: Any) -> router_pb2.ExplainRequest:
    """For the first of those tokens."""
    return router_pb2.ExplainRequest(
        layer=0,
        hidden=to_proto(random_hidden(num_tokens)),
        selection=router_pb2.SelectionOptions(**selection),
    )


async def test_a_budget_of_nothing_is_the_gates_choice_bit_for_bit(caller: RouterCaller) -> None:
    plain = await caller.router.Forward(forward_request())
    exact = await caller.router.Forward(forward_request(quality_budget=0.0, policy="budget"))
    assert plain == exact
    assert not plain.given_up_mass


async def test_experts_of_a_busy_replica_are_given_up_within_the_budget(
    mesh: Mesh, router: Router, caller: RouterCaller
) -> None:
    plain = await caller.router.Forward(forward_request())
    busy = mesh._replicas[0]
    with stalled(busy):
        waiting = caller.router.Dispatch(
            router_pb2.DispatchRequest(
                layer=0,
                hidden=to_proto(random_hidden(400)),
                experts=to_proto(torch.zeros(400, 1, dtype=torch.long)),
                weights=to_proto(torch.ones(400, 1)),
            )
        )
        await until(lambda: router.in_flight_rows("g0#1") == 400)
        answer = asyncio.ensure_future(_forward(caller, quality_budget=0.95))
        explained = await caller.router.Explain(explain_request(quality_budget=0.95))
        await until(lambda: router.in_flight_rows("g0#1") > 400)  # tokens that need it most
    await waiting
    response = await answer
    exact_TK = from_proto(plain.experts, "experts")
    experts_TK = from_proto(response.experts, "experts")
    assert len(response.given_up_mass) == TOKENS
    busy_ones: set[int] = set()
    for token, given_up in enumerate(response.given_up_mass):
        assert 0 <= given_up <= 0.95
        gave_up = set(exact_TK[token].tolist()) - set(experts_TK[token].tolist())
        assert not given_up or gave_up
        busy_ones |= gave_up & {0, 1}
        for expert in explained.tokens[
            token
        ].experts:  # a moment later: others may be cheap by then
            if expert.is_gates_choice and not expert.is_selected:
                assert expert.reason.startswith("given up: costs ")
    assert busy_ones, "experts of the busy replica"


@pytest.mark.parametrize(("top_k", "width"), [(1, 1), (5, 5)])
async def test_top_k_is_a_dial(caller: RouterCaller, top_k: int, width: int) -> None:
    response = await caller.router.Forward(forward_request(top_k=top_k))
    assert response.experts.shape == [TOKENS, width]
    lost = list(response.given_up_mass)
    assert all(lost) if top_k == 1 else lost == [0.0] * TOKENS


async def test_a_token_stays_in_few_groups(caller: RouterCaller) -> None:
    response = await caller.router.Forward(forward_request(max_groups=1))
    for own in from_proto(response.experts, "experts").tolist():
        assert len({expert // 2 for expert in own}) == 1


async def test_explanations_are_of_what_a_call_does(caller: RouterCaller) -> None:
    explained = await caller.router.Explain(explain_request())
    response = await caller.router.Forward(forward_request())
    experts_TK = from_proto(response.experts, "experts").tolist()
    weights_TK = from_proto(response.weights, "weights").tolist()
    for token, own in enumerate(explained.tokens):
        selected = {e.expert: e for e in own.experts if e.is_selected}
        assert set(selected) == set(experts_TK[token])
        for expert, weight in zip(experts_TK[token], weights_TK[token], strict=True):
            told = selected[expert]
            assert told.weight == pytest.approx(weight)
            assert told.reason == "the gate's choice"
            [replica] = told.replicas
            assert replica.replica == f"g{expert // 2}#1"
            assert (replica.rows, replica.reason) == (1, "the only holder")
            assert replica.resident
            assert replica.cost_us > 0
        ranks = [e.rank for e in own.experts]
        assert ranks == sorted(ranks)
        others = [e for e in own.experts if not e.is_selected]
        assert {e.reason for e in others} == {"the gate ranks others higher"}


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"quality_budget": 1.0}, "quality_budget: Input should be less than 1"),
        ({"quality_budget": -0.5}, "quality_budget: Input should be greater than or equal to 0"),
        ({"quality_budget": float("nan")}, "quality_budget: Input should be"),
        ({"layer_budgets": [-1.0]}, "layer_budgets.0: Input should be greater than or equal to 0"),
        ({"policy": "magic"}, "policy: Input should be 'budget', 'cache_prior' or 'max_rank'"),
        ({"top_k": 9}, "selection.top_k: expected 0 to 8, the model's experts, got 9"),
        (
            {"quality_budget": 0.1, "max_rank": 99},
            "selection.max_rank: expected 0 to 8, the model's experts, got 99",
        ),
    ],
)
async def test_options_that_cannot_be_are_refused(
    caller: RouterCaller, selection: dict[str, Any], message: str
) -> None:
    for call in (
        caller.router.Forward(forward_request(**selection)),
        caller.router.Explain(explain_request(**selection)),
    ):
        error = await refusal(call)
        assert isinstance(error, InvalidInput | ConfigError)
        assert error.message.startswith(message)


async def test_too_many_tokens_to_explain(caller: RouterCaller) -> None:
    error = await refusal(caller.router.Explain(explain_request(17)))
    assert error.message.startswith("hidden.shape: expected at most 16 tokens, got [17, ")


async def test_a_gate_that_picks_one_after_the_other_selects_exactly(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("phimoe")
    await mesh.replica(path)
    router = await mesh.router(path)
    async with RouterCaller(router.target) as caller:
        await caller.router.Forward(forward_request(quality_budget=0.0))
        error = await refusal(caller.router.Forward(forward_request(quality_budget=0.1)))
    assert error.message.startswith("selection: expected a gate that scores experts independently")


async def test_a_share_of_the_calls_is_computed_exactly_too(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    await mesh.replicas(path, 2)
    selection = SelectionSettings(max_groups=1, exact_sample_frac=1.0)
    router = await mesh.router(path, selection=selection)
    async with RouterCaller(router.target) as caller:
        response = await caller.router.Forward(forward_request())
        assert any(response.given_up_mass), "as configured"
        exact = await caller.router.Forward(forward_request(quality_budget=0.0))
        assert not exact.given_up_mass, "a request that says something is followed"
        metrics = router.core._metrics
        await until(lambda: metrics.selection_error.get("tiny") is not None)
    measured = metrics.selection_error.get("tiny")
    assert measured
    out_TD, exact_TD = (from_proto(own.hidden, "hidden") for own in (response, exact))
    assert measured.sum == pytest.approx(float((out_TD - exact_TD).norm() / exact_TD.norm()))
    given_up = metrics.given_up_mass.get("tiny")
    assert given_up
    assert given_up.num == TOKENS
