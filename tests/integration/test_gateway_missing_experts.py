"""What a gateway generates when experts are missing: by whose policy, and how it is told.

T tokens, K experts per token, B batch, S sequence length, V vocabulary.
"""

import asyncio
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from tests.gateways import NUM_NEW, running_gateway, tokens_of
from tests.local_experts import LocalExperts
from tests.mesh import MakeCheckpoint, Mesh
from tests.reference_experts import load_model
from transformers import AutoModelForCausalLM

from expertmesh.client.course import Chunk
from expertmesh.client.generate import AsyncClient, request_of
from expertmesh.client.hooks import attach_caller
from expertmesh.runtime.errors import ExpertUnavailable, InvalidInput
from expertmesh.runtime.missing_experts import to_proto as policy_to_proto
from expertmesh.runtime.tensors import from_proto, to_proto
from expertmesh.services import cli
from expertmesh.services.parity import generate_greedy, pad_left
from expertmesh.services.settings import SelectionSettings
from expertmesh.v1 import generate_pb2, generate_pb2_grpc
from expertmesh.v1.router_pb2 import SelectionOptions

PROMPTS = [[5, 17, 40, 90, 7], [200, 3, 11], [9, 8, 7, 6, 5, 4, 3, 77, 120]]
DEAD = {6, 7}


@dataclass
class WithoutSome(LocalExperts):
    """transformers' experts without the dead ones: the others' weights scaled, by hand."""

    masses: list[float] = field(default_factory=list)
    """Of every token in every layer."""

    def _run(
        self, module: Any, hidden_TD: Any, experts_TK: Any, weights_TK: Any, combine: int
    ) -> Any:
        scaled_TK = weights_TK.clone()
        for token, ids in enumerate(experts_TK.tolist()):
            weights = weights_TK[token].double().tolist()
            live = sum(w for e, w in zip(ids, weights, strict=True) if e not in DEAD)
            self.masses.append(1 - live / sum(weights))
            for slot, expert in enumerate(ids):
                factor = 0.0 if expert in DEAD else sum(weights) / live
                if live < sum(weights):
                    scaled_TK[token, slot] = weights[slot] * factor
        return super()._run(module, hidden_TD, experts_TK, scaled_TK, combine)


def without_some(path: Path) -> tuple[Any, WithoutSome]:
    """The model as transformers would run it without the dead experts."""
    caller = WithoutSome(LocalExperts.of(load_model(path, torch.float32)).layers)
    return attach_caller(load_model(path, torch.float32), caller), caller


async def score(address: str, policy: str | None, prompt: list[int]) -> generate_pb2.ScoreResponse:
    async with grpc.aio.insecure_channel(address) as channel:
        request = generate_pb2.ScoreRequest(
            tokens=to_proto(torch.tensor([prompt])), missing_experts=policy_to_proto(policy)
        )
        response: generate_pb2.ScoreResponse
        response = await generate_pb2_grpc.GenerateServiceStub(channel).Score(request)
        return response


async def chunks_of(address: str, prompt: Sequence[int], **asked: Any) -> list[Chunk]:
    async with AsyncClient(address) as client:
        request = request_of(prompt, max_new_tokens=NUM_NEW, ignore_eos=True, **asked)
        return [chunk async for chunk in client.generate(request)]


def ids(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.tokens]


async def test_a_degraded_forward_is_transformers_without_the_experts(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral", num_experts_per_tok=4)
    replicas = await mesh.replicas(path, 4, deterministic=True)
    model, without = without_some(path)
    [prompt, *_] = PROMPTS
    async with running_gateway(mesh, path, deterministic=True) as address:
        exact = await score(address, "renormalise", prompt)
        exact_tokens = await tokens_of(address, prompt)
        assert (exact.degraded_mass.largest, exact.degraded_mass.mean) == (0, 0)
        await mesh.kill(replicas["g3#1"])
        for _ in range(2):
            without.masses.clear()
            with torch.no_grad():
                expected_BSV = model(torch.tensor([prompt])).logits
            degraded = await score(address, "renormalise", prompt)
            assert torch.equal(from_proto(degraded.logits, "logits"), expected_BSV)
            mass = degraded.degraded_mass
            assert mass.largest == pytest.approx(max(without.masses), abs=1e-6)
            mean = sum(without.masses) / len(without.masses)
            assert mass.mean == pytest.approx(mean, abs=1e-6)
        without.masses.clear()
        expected = generate_greedy(model, pad_left([prompt], pad_id=0)).tokens_BN[0].tolist()
        chunks = await chunks_of(address, prompt, missing_experts="renormalise")
        assert ids(chunks) == expected[:NUM_NEW]
        assert chunks[-1].degraded_mass == pytest.approx(max(without.masses), abs=1e-5)
        mean = sum(without.masses) / len(without.masses)
        assert chunks[-1].mean_degraded_mass == pytest.approx(mean, abs=1e-5)
        with pytest.raises(ExpertUnavailable, match="no live replica"):
            await chunks_of(address, prompt)
        chunks = await chunks_of(address, prompt, missing_experts="substitute")
        assert chunks[-1].degraded_mass > 0
        await mesh.replica(path, "6-7", "g3#2", deterministic=True)
        assert await tokens_when_exact(address, prompt) == exact_tokens


async def tokens_when_exact(address: str, prompt: list[int]) -> list[int]:
    """As soon as nothing is missing any more."""
    for _ in range(1000):
        chunks = await chunks_of(address, prompt, missing_experts="substitute")
        if not chunks[-1].degraded_mass:
            return ids(chunks)
    pytest.fail("the experts did not come back")


async def test_each_request_of_a_batch_is_told_its_own_mass(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral", num_experts_per_tok=4)
    replicas = await mesh.replicas(path, 4)
    options = {"engine": "continuous", "missing_experts": "substitute"}
    async with running_gateway(mesh, path, **options) as address:
        [exact] = [await chunks_of(address, PROMPTS[0])]
        assert exact[-1].degraded_mass == 0
        await mesh.kill(replicas["g3#1"])
        alone = [await chunks_of(address, prompt) for prompt in PROMPTS]
        together = await asyncio.gather(*(chunks_of(address, prompt) for prompt in PROMPTS))
        for one, other in zip(alone, together, strict=True):
            assert ids(one) == ids(other)
            assert 0 < one[-1].mean_degraded_mass < one[-1].degraded_mass
            assert other[-1].degraded_mass == pytest.approx(one[-1].degraded_mass, rel=1e-3)
            mean = one[-1].mean_degraded_mass
            assert other[-1].mean_degraded_mass == pytest.approx(mean, rel=1e-3)
        assert len({chunks[-1].mean_degraded_mass for chunks in alone}) == len(PROMPTS)
        largest = [chunk.degraded_mass for chunk in together[0]]
        assert largest == sorted(largest)
        assert (await score(address, None, PROMPTS[0])).degraded_mass.largest > 0
        assert (await score(address, "renormalise", PROMPTS[0])).degraded_mass.largest > 0


async def test_a_gateway_that_batches_has_one_policy(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    await mesh.replicas(path, 2)
    options = {"engine": "continuous", "missing_experts": "renormalise"}
    async with running_gateway(mesh, path, **options) as address:
        for policy in ("strict", "substitute"):
            with pytest.raises(InvalidInput, match=r"^missing_experts: expected 'renormalise'"):
                await chunks_of(address, PROMPTS[0], missing_experts=policy)
        with pytest.raises(InvalidInput, match=r"^selection: expected unset"):
            await chunks_of(address, PROMPTS[0], selection=SelectionOptions(top_k=1))
        chunks = await chunks_of(address, PROMPTS[0], missing_experts="renormalise")
        assert ids(chunks) == await tokens_of(address, PROMPTS[0])


async def test_the_exact_engine_selects_as_each_request_asks(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    await mesh.replicas(path, 2)
    prompt = PROMPTS[0]
    expected = {}
    for top_k in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(path, num_experts_per_tok=top_k).eval()
        greedy = generate_greedy(model, pad_left([prompt], pad_id=0))
        expected[top_k] = greedy.tokens_BN[0].tolist()[:NUM_NEW]
    assert expected[1] != expected[2]
    selection = SelectionSettings(top_k=1)
    async with (
        running_gateway(mesh, path, engine="exact") as plain,
        running_gateway(mesh, path, engine="exact", selection=selection) as narrow,
    ):
        for address, own in ((plain, 2), (narrow, 1)):
            assert ids(await chunks_of(address, prompt)) == expected[own]
            for top_k in (1, 2):
                asked = SelectionOptions(top_k=top_k)
                assert ids(await chunks_of(address, prompt, selection=asked)) == expected[top_k]
            asked = SelectionOptions()  # exactly
            assert ids(await chunks_of(address, prompt, selection=asked)) == expected[2]
        with pytest.raises(InvalidInput, match=r"selection.top_k: expected 0 to 8"):
            await chunks_of(plain, prompt, selection=SelectionOptions(top_k=9))
        with pytest.raises(InvalidInput, match="quality_budget"):
            await chunks_of(plain, prompt, selection=SelectionOptions(quality_budget=2))


async def test_a_model_that_cannot_substitute_says_so(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("phimoe")
    await mesh.replicas(path, 2)
    async with running_gateway(mesh, path, engine="exact") as address:
        with pytest.raises(InvalidInput, match=r"^missing_experts: expected a gate"):
            await chunks_of(address, PROMPTS[0], missing_experts="substitute")
        with pytest.raises(InvalidInput, match=r"^selection: expected a gate"):
            await chunks_of(address, PROMPTS[0], selection=SelectionOptions(top_k=1))
        assert ids(await chunks_of(address, PROMPTS[0], missing_experts="renormalise"))
    with pytest.raises(InvalidInput, match=r"^missing_experts\.policy: expected a gate"):
        async with running_gateway(mesh, path, missing_experts="substitute"):
            pass


async def test_the_command_tells_what_is_degraded(
    mesh: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(__file__).parents[2] / "examples/demo-moe"
    replicas = await mesh.replicas(path, 4)
    async with running_gateway(mesh, path, engine="exact") as address:
        command = f"generate 'import os' --max-new-tokens 8 --target {address}"
        assert await asyncio.to_thread(cli.main, shlex.split(command)) == 0
        assert "degraded" not in capsys.readouterr().err
        await mesh.kill(replicas["g2#1"])
        assert await asyncio.to_thread(cli.main, shlex.split(command)) != 0
        error = capsys.readouterr().err
        assert "expert 4" in error or "expert 5" in error
        command += " --missing-experts substitute"
        assert await asyncio.to_thread(cli.main, shlex.split(command)) == 0
        assert "degraded: experts were missing, with up to " in capsys.readouterr().err
        status = f"status --once --target {address}"
        assert await asyncio.to_thread(cli.main, shlex.split(status)) == 0
        assert "MISSING, no live replica: experts 4-5 of layers 0-3" in capsys.readouterr().out
