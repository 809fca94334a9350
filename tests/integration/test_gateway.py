"""The gateway over real replicas: exact answers, and failures that cost only their own call."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from tests.checkpoints import VOCAB_SIZE
from tests.collector import collecting
from tests.mesh import HOST, MODEL, MakeCheckpoint, Mesh
from transformers import AutoModelForCausalLM

from expertmesh.client.failures import error_of
from expertmesh.client.generate import AsyncClient, request_of
from expertmesh.runtime.channels import DEFAULT_MAX_MESSAGE_BYTES
from expertmesh.runtime.errors import (
    ExpertMeshError,
    ExpertUnavailable,
    InvalidInput,
    MessageTooLarge,
)
from expertmesh.runtime.telemetry import configure
from expertmesh.runtime.tensors import from_proto, to_proto
from expertmesh.services.gateway.deployment import GatewayArgs
from expertmesh.services.gateway.gateway import Gateway
from expertmesh.services.health import wait_serving
from expertmesh.services.parity import generate_greedy, pad_left, random_prompts
from expertmesh.v1 import generate_pb2, generate_pb2_grpc

NUM_NEW = 16
READY_S = 20.0


@asynccontextmanager
async def running_gateway(mesh: Mesh, path: Path, **changes: Any) -> AsyncIterator[str]:
    """A gateway of this mesh; yields its address."""
    fields: dict[str, Any] = {
        "host": HOST,
        "port": 0,
        "model_dir": str(path),
        "model": MODEL,
        "redis_url": mesh.redis_url,
        "mesh": mesh.name,
        "dtype": "auto",
        "deterministic": False,
        "max_message_bytes": DEFAULT_MAX_MESSAGE_BYTES,
        "otlp_endpoint": None,
        "log_level": "WARNING",
        "kv_cache_tokens": 2048,
        "max_batch_tokens": 128,
    }
    gateway = await Gateway.start(GatewayArgs(**(fields | changes)))
    try:
        await wait_serving(gateway.address, READY_S)
        yield gateway.address
    finally:
        await gateway.stop()


async def tokens_of(address: str, prompt: list[int], num_new: int = NUM_NEW) -> list[int]:
    async with AsyncClient(address) as client:
        request = request_of(prompt, max_new_tokens=num_new, ignore_eos=True)
        return [token async for chunk in client.generate(request) for token in chunk.tokens]


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
