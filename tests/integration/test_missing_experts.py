"""Calls whose experts die: what each policy gives, bit by bit, and what it announces and refuses.

T tokens, D hidden size, K experts per token.
"""

import asyncio

import pytest
import torch
from tests.degraded_mesh import (
    DEADLINE_S,
    LAYER,
    RENORMALISE,
    STRICT,
    SUBSTITUTE,
    TOKENS,
    hidden_for,
    ready,
    reference,
    reference_apart,
    renormalised_by_hand,
)
from tests.mesh import MODEL, MakeCheckpoint, Mesh, stalled
from tests.packing import random_hidden
from tests.router_caller import Routed, refusal
from tests.waiting import until

from expertmesh.router.gate import Scored
from expertmesh.runtime.errors import ExpertUnavailable, InvalidInput
from expertmesh.runtime.tensors import from_proto
from expertmesh.services.settings import SelectionSettings
from expertmesh.v1 import router_pb2

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "dbrx"])
async def test_renormalised_answers_are_those_of_the_reduced_routing(
    mesh: Mesh, checkpoint: MakeCheckpoint, family: str, dtype: torch.dtype
) -> None:
    path = checkpoint(family, dtype=dtype)
    async with ready(mesh, path, deterministic=True) as own:
        dead = {2, 3}
        hidden_TD = hidden_for(own, dead, dtype)
        routing = own.choice(hidden_TD)
        weights_TK, masses = renormalised_by_hand(routing, dead)
        # in the reference the dead compute, too, with a weight of nothing
        expected_TD = reference(own, hidden_TD, Routed(routing.experts_TK, weights_TK))
        exact = await own.dispatch(hidden_TD, routing, RENORMALISE)
        assert list(exact.degraded_mass) == [0.0] * len(hidden_TD)
        await mesh.kill(own.replicas["g1#1"])
        for _ in range(2):  # at the broken stream, then by the snapshot
            answer = await own.dispatch(hidden_TD, routing, RENORMALISE)
            assert torch.equal(from_proto(answer.hidden, "hidden"), expected_TD)
            assert list(answer.degraded_mass) == pytest.approx(masses, abs=1e-6)
        exact_T = torch.tensor(masses) == 0
        same_TD = from_proto(exact.hidden, "hidden")[exact_T]
        assert torch.equal(from_proto(answer.hidden, "hidden")[exact_T], same_TD)
        forwarded = await own.forward(hidden_TD, RENORMALISE)
        assert torch.equal(from_proto(forwarded.hidden, "hidden"), expected_TD)
        gone_TK = torch.isin(routing.experts_TK, torch.tensor(sorted(dead)))
        told_TK = routing.experts_TK.masked_fill(gone_TK, -1)
        assert torch.equal(from_proto(forwarded.experts, "experts"), told_TK)
        assert torch.equal(from_proto(forwarded.weights, "weights"), weights_TK)


def substituted_by_hand(scored: Scored, dead: set[int]) -> Routed:
    """The next-best living experts, token by token in Python."""
    experts = []
    mass_TE, choice_TE = scored.mass().tolist(), scored.choice_TE.tolist()
    for token, ids in enumerate(scored.top(scored.spec.top_k).tolist()):
        mass, choice = mass_TE[token], choice_TE[token]
        fill = scored.spec.group_fill if scored.spec.is_grouped else None
        others = [e for e in range(len(choice)) if e not in dead and e not in ids]
        key = {e: (0, -mass[e]) if choice[e] == fill else (-1, -choice[e]) for e in others}
        others.sort(key=key.__getitem__)
        experts.append([others.pop(0) if e in dead else e for e in ids])
    experts_TK = torch.tensor(experts)
    return Routed(experts_TK, scored.weights(experts_TK))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
async def test_substitutes_are_the_next_best_of_the_true_gate(
    mesh: Mesh, checkpoint: MakeCheckpoint, family: str, dtype: torch.dtype
) -> None:
    async with ready(mesh, checkpoint(family, dtype=dtype), deterministic=True) as own:
        dead = {4, 5}
        many_TD = hidden_for(own, dead, dtype)
        parts = [many_TD, many_TD[:3].clone(), many_TD[3:7].clone(), many_TD[7:8].clone()]
        healthy = [await own.forward(part_TD, SUBSTITUTE) for part_TD in parts]
        await mesh.kill(own.replicas["g2#1"])
        for hidden_TD, before in zip(parts, healthy, strict=True):
            routing = own.choice(hidden_TD)
            expected = substituted_by_hand(own.scored(hidden_TD), dead)
            expected_TD = reference_apart(own, hidden_TD, routing, expected, dead)
            masses = renormalised_by_hand(routing, dead)[1]
            answer = await own.forward(hidden_TD, SUBSTITUTE)
            assert torch.equal(from_proto(answer.experts, "experts"), expected.experts_TK)
            assert torch.equal(from_proto(answer.weights, "weights"), expected.weights_TK)
            assert torch.equal(from_proto(answer.hidden, "hidden"), expected_TD)
            told = list(answer.degraded_mass)
            assert told == pytest.approx(masses, abs=1e-6)
            exact_T = torch.tensor(told) == 0
            same_TD = from_proto(before.hidden, "hidden")[exact_T]
            assert torch.equal(from_proto(answer.hidden, "hidden")[exact_T], same_TD)


async def test_strict_names_what_is_missing_and_recovery_is_exact(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    async with ready(mesh, path, deterministic=True) as own:
        hidden_TD = hidden_for(own, {6, 7})
        routing = own.choice(hidden_TD)
        exact = await own.forward(hidden_TD, STRICT)
        await mesh.kill(own.replicas["g3#1"])
        loop = asyncio.get_running_loop()
        for policy in (STRICT, router_pb2.MISSING_EXPERTS_UNSPECIFIED):
            for call in (
                own.forward(hidden_TD, policy),
                own.dispatch(hidden_TD, routing, policy),
            ):
                started_s = loop.time()
                error = await refusal(call)
                assert loop.time() - started_s < DEADLINE_S
                assert type(error) is ExpertUnavailable
                assert error.fields["model"] == MODEL
                assert error.fields["layer"] == str(LAYER)
                assert error.fields["expert"] in ("6", "7")
                assert "g3#1" in error.fields["cause"]
                assert "broke" in error.fields["cause"]
        degraded = await own.forward(hidden_TD, SUBSTITUTE)
        assert max(degraded.degraded_mass) > 0
        assert exact.hidden != degraded.hidden
        [missing, other] = (await own.caller.snapshot()).missing
        assert (missing.layer, list(missing.experts)) == (0, [6, 7])
        assert (other.layer, list(other.experts)) == (1, [6, 7])
        await mesh.replica(path, "6-7", "g3#2", deterministic=True)
        await own.router.core.wait_complete(5)
        assert not (await own.caller.snapshot()).missing
        for policy in (STRICT, SUBSTITUTE, RENORMALISE):
            assert await own.forward(hidden_TD, policy) == exact


async def test_experts_that_die_one_group_after_the_other_in_a_call(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    async with ready(mesh, checkpoint("mixtral", num_experts_per_tok=4)) as own:
        hidden_TD = random_hidden(TOKENS)
        routing = own.choice(hidden_TD)
        with stalled(own.replicas["g0#1"]), stalled(own.replicas["g1#1"]):
            call = asyncio.ensure_future(own.forward(hidden_TD, RENORMALISE))
            for name in ("g0#1", "g1#1"):
                await until(lambda name=name: own.router.in_flight_rows(name) > 0)  # type: ignore[misc]
                await mesh.kill(own.replicas[name])
            answer = await call
        weights_TK, masses = renormalised_by_hand(routing, {0, 1, 2, 3})
        assert list(answer.degraded_mass) == pytest.approx(masses, abs=1e-6)
        expected_TD = reference(own, hidden_TD, Routed(routing.experts_TK, weights_TK))
        torch.testing.assert_close(from_proto(answer.hidden, "hidden"), expected_TD)
        metrics = own.router.core._metrics
        assert metrics.errors.get("router", "UNAVAILABLE") == 0
        degraded = metrics.degraded_mass.get(MODEL)
        assert degraded
        assert degraded.num == sum(mass > 0 for mass in masses)
        assert degraded.sum == pytest.approx(sum(masses), abs=1e-5)


@pytest.mark.parametrize("policy", [RENORMALISE, SUBSTITUTE])
async def test_a_token_without_a_living_expert_is_an_error(
    mesh: Mesh, checkpoint: MakeCheckpoint, policy: int
) -> None:
    async with ready(mesh, checkpoint("mixtral")) as own:
        dead = ["g0#1", "g1#1", "g2#1"]
        if policy == SUBSTITUTE:
            dead.append("g3#1")
        for name in dead:
            await mesh.kill(own.replicas[name])
        hidden_TD = random_hidden(64)
        error = await refusal(own.forward(hidden_TD, policy))
        assert type(error) is ExpertUnavailable
        assert "nothing is left of token" in error.message
        assert int(error.fields["expert"]) < 6 or policy == SUBSTITUTE
        if policy == SUBSTITUTE:
            return
        answer = await own.forward(hidden_TD, SUBSTITUTE)
        experts_TK = from_proto(answer.experts, "experts")
        assert set(experts_TK.flatten().tolist()) <= {-1, 6, 7}
        assert from_proto(answer.hidden, "hidden").isfinite().all()
        sums_T = from_proto(answer.weights, "weights").sum(1)
        torch.testing.assert_close(sums_T, torch.ones(64))


async def test_the_routers_default_is_what_calls_get_that_say_nothing(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    options = {"missing_experts": "substitute"}
    # the first call splits its rows at the broken stream, and fp32 bits depend on their number
    async with ready(mesh, checkpoint("mixtral"), options, deterministic=True) as own:
        hidden_TD = hidden_for(own, {0, 1})
        routing = own.choice(hidden_TD)
        await mesh.kill(own.replicas["g0#1"])
        unspecified = router_pb2.MISSING_EXPERTS_UNSPECIFIED
        answer = await own.forward(hidden_TD, unspecified)
        assert answer == await own.forward(hidden_TD, SUBSTITUTE)
        dispatched = await own.dispatch(hidden_TD, routing, unspecified)
        assert dispatched == await own.dispatch(hidden_TD, routing, RENORMALISE)
        assert type(await refusal(own.forward(hidden_TD, STRICT))) is ExpertUnavailable


async def test_a_selection_that_misses_experts_is_mended_by_policy(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    options = {"selection": SelectionSettings(top_k=3)}
    async with ready(mesh, checkpoint("mixtral"), options) as own:
        hidden_TD = hidden_for(own, {0, 1})
        await mesh.kill(own.replicas["g0#1"])
        answer = await own.forward(hidden_TD, SUBSTITUTE)
        assert answer.experts.shape == [TOKENS, 3]
        assert from_proto(answer.experts, "experts").min() >= 2
        assert max(answer.degraded_mass) > 0
        assert max(answer.given_up_mass) == 0, "more experts than the gate's, none given up"


async def test_what_cannot_be_is_refused(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    async with ready(mesh, checkpoint("phimoe")) as own:
        hidden_TD = random_hidden(3)
        routing = Routed(torch.tensor([[0, 1]] * 3), torch.ones(3, 2))
        error = await refusal(own.dispatch(hidden_TD, routing, SUBSTITUTE))
        assert type(error) is InvalidInput
        assert error.message.startswith("missing_experts: expected STRICT or RENORMALISE")
        error = await refusal(own.dispatch(hidden_TD, routing, 9))
        assert error.message.startswith("missing_experts: expected one of MISSING_EXPERTS_UNSPEC")
        error = await refusal(own.forward(hidden_TD, SUBSTITUTE))
        assert error.message.startswith("missing_experts: expected a gate that scores experts ind")
        minus = Routed(torch.tensor([[0, -1]] * 3), torch.ones(3, 2))
        error = await refusal(own.dispatch(hidden_TD, minus, RENORMALISE))
        assert "expert -1: ids of this layer are 0 to 7" in error.message
    with pytest.raises(InvalidInput, match=r"missing_experts\.policy: expected a gate"):
        await mesh.router(checkpoint("phimoe"), missing_experts="substitute")


async def test_a_family_that_weighs_the_inputs_is_strict(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    async with ready(mesh, checkpoint("llama4")) as own:
        hidden_TD = random_hidden(32)
        exact = await own.forward(hidden_TD, RENORMALISE)
        assert list(exact.degraded_mass) == [0.0] * len(hidden_TD)
        await mesh.kill(own.replicas["g1#1"])
        assert type(await refusal(own.forward(hidden_TD, RENORMALISE))) is ExpertUnavailable
