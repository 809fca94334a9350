"""The gateway over real replicas: exact answers, and failures that cost only their own call."""

import contextlib
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from chaos.collector import collecting
from tests.checkpoints import VOCAB_SIZE
from tests.gateways import running_gateway, tokens_of
from tests.mesh import MakeCheckpoint, Mesh
from transformers import AutoModelForCausalLM

from expertmesh.client.failures import error_of
from expertmesh.runtime.errors import (
    ExpertMeshError,
    ExpertUnavailable,
    InvalidInput,
    MessageTooLarge,
)
from expertmesh.runtime.telemetry import configure
from expertmesh.runtime.tensors import from_proto, to_proto
from expertmesh.services.parity import generate_greedy, pad_left, random_prompts
from expertmesh.services.settings import SelectionSettings
from expertmesh.v1 import generate_pb2, generate_pb2_grpc

NUM_NEW = 16
READY_S = 20.0


async def score(address: str, **fields: Any) -> torch.Tensor:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        try:
            reply = await stub.Score(generate_pb2.ScoreRequest(**fields))
        except grpc.RpcError as failure:
            raise error_of(failure) from None
    return from_proto(reply.logits, "logits")


def load_full(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


@pytest.mark.parametrize(("family", "engine"), [("mixtral", "continuous"), ("jamba", "exact")])
async def test_tokens_and_logits_are_those_of_transformers(
    mesh: Mesh, checkpoint: MakeCheckpoint, family: str, engine: str
) -> None:
    path, prompts = checkpoint(family), random_prompts(VOCAB_SIZE)
    await mesh.replicas(path, 2)
    reference = load_full(path)
    with torch.no_grad():
        expected = reference(prompts.tokens_BS, attention_mask=prompts.mask_BS).logits
    async with running_gateway(mesh, path, engine=engine) as address:
        fields = {"tokens": to_proto(prompts.tokens_BS), "mask": to_proto(prompts.mask_BS)}
        assert torch.equal(await score(address, **fields), expected)
        for prompt in prompts.rows():
            alone = generate_greedy(reference, pad_left([prompt], pad_id=0))
            assert await tokens_of(address, prompt) == alone.tokens_BN[0].tolist()


async def test_a_selection_that_changes_nothing_has_the_same_bits(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path, prompts = checkpoint("mixtral"), random_prompts(VOCAB_SIZE)
    await mesh.replicas(path, 2)
    with torch.no_grad():
        expected = load_full(path)(prompts.tokens_BS, attention_mask=prompts.mask_BS).logits
    fields = {"tokens": to_proto(prompts.tokens_BS), "mask": to_proto(prompts.mask_BS)}
    for selection in (SelectionSettings(quality_budget=0.3), SelectionSettings(top_k=2)):
        async with running_gateway(mesh, path, selection=selection) as address:
            assert torch.equal(await score(address, **fields), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
async def test_fewer_experts_are_those_of_a_model_with_fewer(
    mesh: Mesh, checkpoint: MakeCheckpoint, family: str, dtype: torch.dtype
) -> None:
    path, prompts = checkpoint(family, dtype=dtype), random_prompts(VOCAB_SIZE)
    await mesh.replicas(path, 2)
    fewer = AutoModelForCausalLM.from_pretrained(path, dtype="auto", num_experts_per_tok=1).eval()
    with torch.no_grad():
        expected = fewer(prompts.tokens_BS, attention_mask=prompts.mask_BS).logits
    fields = {"tokens": to_proto(prompts.tokens_BS), "mask": to_proto(prompts.mask_BS)}
    async with running_gateway(mesh, path, selection=SelectionSettings(top_k=1)) as address:
        assert torch.equal(await score(address, **fields), expected)


async def answered(address: str, prompts: list[list[int]]) -> int:
    """How many of these prompts get a token."""
    num = 0
    for prompt in prompts:
        with contextlib.suppress(ExpertUnavailable):
            num += len(await tokens_of(address, prompt, 1))
    return num


async def test_a_missing_group_costs_quality_where_that_is_allowed(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    """A row whose best expert is the one lost still fails."""
    path = checkpoint("mixtral", num_experts_per_tok=4)
    replicas = await mesh.replicas(path, 8)
    selection = SelectionSettings(quality_budget=0.99, exact_sample_frac=1)
    prompts = [[token] for token in range(5, 25)]
    async with (
        running_gateway(mesh, path, selection=selection) as lenient,
        running_gateway(mesh, path) as exact,
    ):
        assert await answered(lenient, prompts) == await answered(exact, prompts) == len(prompts)
        await replicas["g5#1"].drain_and_stop()
        assert await answered(lenient, prompts) > await answered(exact, prompts)


@pytest.mark.parametrize(
    ("family", "selection", "error"),
    [
        ("llama4", SelectionSettings(quality_budget=0.1), InvalidInput),
        ("mixtral", SelectionSettings(top_k=9), InvalidInput),
    ],
)
async def test_a_selection_that_cannot_be_is_refused_at_the_start(
    mesh: Mesh,
    checkpoint: MakeCheckpoint,
    family: str,
    selection: SelectionSettings,
    error: type[ExpertMeshError],
) -> None:
    path = checkpoint(family)
    with pytest.raises(error, match="selection"):
        async with running_gateway(mesh, path, selection=selection):
            pass


async def test_a_missing_group_fails_the_call_and_its_return_mends_it(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    replicas = await mesh.replicas(path, 2)
    async with running_gateway(mesh, path) as address:
        before = await tokens_of(address, [5, 6, 7])
        await replicas["g1#1"].drain_and_stop()
        with pytest.raises(ExpertUnavailable) as failure:
            await tokens_of(address, [5, 6, 7])
        assert failure.value.fields["layer"] == "0"
        assert int(failure.value.fields["expert"]) >= 4
        await mesh.replica(path, "4-7", "g1#2")
        await wait_for_tokens(address, [5, 6, 7], before)


async def wait_for_tokens(address: str, prompt: list[int], expected: list[int]) -> None:
    """Until the mesh answers again; while it does not, the error is typed."""
    for _ in range(1000):
        try:
            got = await tokens_of(address, prompt)
        except ExpertMeshError as error:
            if not error.retryable:
                raise
        else:
            assert got == expected
            return
    pytest.fail("the gateway did not come back")


async def test_wrong_scores_are_refused_and_the_next_is_answered(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    await mesh.replicas(path, 2)
    good = to_proto(torch.randint(0, VOCAB_SIZE, (1, 4)))
    limit = 4 * VOCAB_SIZE * 4
    async with running_gateway(mesh, path, max_message_bytes=limit + 64) as address:
        for tokens in (torch.zeros(4), torch.zeros(1, 0).long(), torch.full((1, 2), VOCAB_SIZE)):
            with pytest.raises(InvalidInput, match="tokens"):
                await score(address, tokens=to_proto(tokens))
        with pytest.raises(MessageTooLarge):
            await score(address, tokens=to_proto(torch.zeros(1, 5).long()))
        assert (await score(address, tokens=good)).shape == (1, 4, VOCAB_SIZE)


async def test_one_trace_from_client_to_batch(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("mixtral")
    with collecting() as (collector, url):
        client = configure("client", url)
        await mesh.replicas(path, 2, otlp_endpoint=url)
        async with running_gateway(mesh, path, otlp_endpoint=url) as address:
            with client.span("client.generate"):
                await tokens_of(address, [5, 6, 7], num_new=3)
        client.shutdown()
        await mesh.stop_replicas()
        spans = {span.span_id: span for span in collector.all_spans}
    [root] = [span for span in spans.values() if span.name == "client.generate"]
    own = [span for span in spans.values() if span.trace_id == root.trace_id]
    chains = {chain_of(span, spans) for span in own if span.name == "expert.batch"}
    assert chains == {
        "client.generate > gateway.Generate > router.dispatch > router.send > expert.compute > "
        "expert.batch"
    }
    num_forwards, num_layers = 3, 2  # the prompt's gives the first token
    names = [span.name for span in own]
    assert names.count("router.dispatch") == num_forwards * num_layers


def chain_of(span: Any, spans: dict[bytes, Any]) -> str:
    """The names from the root down."""
    above = spans.get(span.parent_span_id)
    return f"{chain_of(above, spans)} > {span.name}" if above else str(span.name)
