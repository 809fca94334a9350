"""GenerateService over a real engine and tiny model, called without a socket."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.checkpoints import VOCAB_SIZE, tiny_model
from tests.local_experts import LocalExperts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from expertmesh.client.hooks import attach_caller
from expertmesh.client.skeleton import share_skeleton
from expertmesh.runtime import tensors
from expertmesh.runtime.errors import (
    ExpertMeshError,
    ExpertUnavailable,
    InvalidInput,
    MessageTooLarge,
    UnknownModel,
)
from expertmesh.runtime.telemetry import configure
from expertmesh.services.gateway.engine import EngineKind, choose_engine
from expertmesh.services.gateway.engine_config import EngineConfig
from expertmesh.services.gateway.sampling import limits_of
from expertmesh.services.gateway.servicer import GenerateServicer, ServedModel
from expertmesh.v1 import generate_pb2 as pb
from expertmesh.v1 import router_pb2, tensor_pb2

PROMPT = (5, 17, 40, 90, 7)
NUM_NEW = 12
MAX_BYTES = 1 << 20


def tokenizer() -> PreTrainedTokenizerFast:
    """One id per byte, as many as the tiny models have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@dataclass(frozen=True)
class Gateway:
    full: Any
    caller: LocalExperts
    model: ServedModel
    servicer: GenerateServicer

    def generate(self) -> list[int]:
        ids = torch.tensor([PROMPT])
        options = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": None}
        tokens: list[int] = self.full.generate(ids, **options)[0, len(PROMPT) :].tolist()
        return tokens

    def with_model(self, **changes: Any) -> GenerateServicer:
        return GenerateServicer(
            replace(self.model, **changes), configure("test"), max_response_bytes=MAX_BYTES
        )


@pytest.fixture
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def build(kind: EngineKind) -> Gateway:
    full, skeleton = tiny_model("mixtral"), tiny_model("mixtral")
    caller = LocalExperts.of(full)
    attach_caller(skeleton, caller)
    config = EngineConfig(max_batch_tokens=64, kv_cache_tokens=256, page_size=16)
    engine = choose_engine(share_skeleton(skeleton), kind, config)
    model = ServedModel(
        info=router_pb2.ModelInfo(name="tiny", model_type="mixtral"),
        engine=engine,
        scorer=skeleton,
        limits=limits_of(skeleton, config.kv_cache_tokens),
        tokenizer=tokenizer(),
    )
    return Gateway(
        full,
        caller,
        model,
        GenerateServicer(model, configure("test"), max_response_bytes=MAX_BYTES),
    )


@pytest.fixture
async def gateway(_one_thread: None) -> AsyncIterator[Gateway]:
    built = build("continuous")
    await built.model.engine.start()
    yield built
    built.servicer.close()
    await built.model.engine.close()


@pytest.fixture
def idle(_one_thread: None) -> Gateway:
    """For requests that must not reach the engine."""
    return build("exact")


class Caller:
    """All that the servicer asks of a call's context."""

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def auth_context(self) -> dict[str, Any]:
        return {}


def ask(**fields: Any) -> pb.GenerateRequest:
    defaults: dict[str, Any] = {"tokens": pb.TokenIds(ids=PROMPT), "max_new_tokens": NUM_NEW}
    defaults["ignore_eos"] = True
    if "text" in fields:
        del defaults["tokens"]
    return pb.GenerateRequest(**defaults | fields)


async def answers(servicer: GenerateServicer, request: pb.GenerateRequest) -> list[Any]:
    context: Any = Caller()
    return [message async for message in servicer.Generate(request, context)]


async def score(servicer: GenerateServicer, request: pb.ScoreRequest) -> torch.Tensor:
    context: Any = Caller()
    return tensors.from_proto((await servicer.Score(request, context)).logits, "logits")


async def test_tokens_and_text_stream_until_max_new_tokens(gateway: Gateway) -> None:
    messages = await answers(gateway.servicer, ask(model="tiny"))
    tokens = [token for message in messages for token in message.tokens]
    assert tokens == gateway.generate()
    assert "".join(message.text for message in messages) == tokenizer().decode(tokens)
    assert len(messages) > 1
    *before, last = messages
    assert not any(message.finish_reason for message in before)
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert (last.prompt_tokens, last.generated_tokens) == (len(PROMPT), NUM_NEW)


async def test_text_is_tokenised(gateway: Gateway) -> None:
    text = tokenizer().decode(PROMPT)
    assert tokenizer().encode(text) == list(PROMPT)
    messages = await answers(gateway.servicer, ask(text=text))
    assert [token for message in messages for token in message.tokens] == gateway.generate()


async def test_end_of_sequence(gateway: Gateway) -> None:
    expected = gateway.generate()
    gateway.model.scorer.generation_config.eos_token_id = expected[3]
    last = (await answers(gateway.servicer, ask(ignore_eos=False)))[-1]
    assert last.finish_reason == pb.FINISH_REASON_EOS
    assert last.generated_tokens == expected.index(expected[3]) + 1


async def test_stop_string_ends_before_itself(gateway: Gateway) -> None:
    full_text = tokenizer().decode(gateway.generate())
    stop = next(char for char in full_text[3:] if char.isascii())
    messages = await answers(gateway.servicer, ask(stop=[stop], max_new_tokens=100))
    text = "".join(message.text for message in messages)
    assert text == full_text[: full_text.index(stop)]
    assert messages[-1].finish_reason == pb.FINISH_REASON_STOP
    assert messages[-1].generated_tokens == sum(len(message.tokens) for message in messages)
    assert messages[-1].generated_tokens <= NUM_NEW


@pytest.mark.parametrize("had", [1, NUM_NEW // 2, NUM_NEW - 1])
async def test_an_answer_is_taken_up_in_the_middle(gateway: Gateway, had: int) -> None:
    expected = gateway.generate()
    messages = await answers(gateway.servicer, ask(generated=pb.TokenIds(ids=expected[:had])))
    assert [token for message in messages for token in message.tokens] == expected[had:]
    assert messages[0].position == had
    before, all_of_it = (tokenizer().decode(expected[:n]) for n in (had, NUM_NEW))
    assert before.rstrip("\ufffd") + "".join(message.text for message in messages) == all_of_it
    last = messages[-1]
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert (last.prompt_tokens, last.generated_tokens) == (len(PROMPT), NUM_NEW)


async def test_leaving_early_frees_the_slot(gateway: Gateway) -> None:
    context: Any = Caller()
    stream = gateway.servicer.Generate(ask(max_new_tokens=200), context)
    await anext(aiter(stream))
    before = len(gateway.caller.calls)
    await stream.aclose()  # type: ignore[attr-defined]  # as grpc does when a call is cancelled
    await answers(gateway.servicer, ask())
    assert [call.num_tokens for call in gateway.caller.calls[-2:]] == [1, 1]
    assert len(gateway.caller.calls) - before < 2 * 100


async def test_expert_failure_reaches_the_call(gateway: Gateway) -> None:
    gateway.caller.errors[3] = ExpertUnavailable("gone", layer=1)
    with pytest.raises(ExpertUnavailable, match="gone"):
        await answers(gateway.servicer, ask())
    tokens = [t for message in await answers(gateway.servicer, ask()) for t in message.tokens]
    assert tokens == gateway.generate()


async def test_unknown_model_names_the_served_one(idle: Gateway) -> None:
    with pytest.raises(UnknownModel, match="tiny"):
        await answers(idle.servicer, ask(model="other"))
    with pytest.raises(UnknownModel, match="tiny"):
        await score(idle.servicer, pb.ScoreRequest(model="other"))


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("prompt", {"text": ""}),
        ("prompt", {"tokens": pb.TokenIds()}),
        ("tokens.ids", {"tokens": pb.TokenIds(ids=[VOCAB_SIZE])}),
        ("max_new_tokens", {"max_new_tokens": 252}),
        ("stop[0]", {"stop": [""]}),
    ],
)
async def test_wrong_requests_compute_nothing(
    idle: Gateway, field: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        await answers(idle.servicer, ask(**fields))
    assert caught.value.fields["field"] == field
    assert not idle.caller.calls


async def test_without_a_tokenizer_only_ids_are_served(gateway: Gateway) -> None:
    servicer = gateway.with_model(tokenizer=None)
    messages = await answers(servicer, ask())
    assert [token for message in messages for token in message.tokens] == gateway.generate()
    assert not any(message.text for message in messages)
    with pytest.raises(InvalidInput, match="text"):
        await answers(servicer, ask(text="x"))
    with pytest.raises(InvalidInput, match="stop"):
        await answers(servicer, ask(stop=["x"]))


async def test_score_is_one_plain_forward_even_while_generating(gateway: Gateway) -> None:
    tokens_BS = torch.randint(3, 250, (3, 17), generator=torch.Generator().manual_seed(1))
    mask_BS = torch.ones_like(tokens_BS)
    mask_BS[0, :5] = 0
    request = pb.ScoreRequest(tokens=tensors.to_proto(tokens_BS), mask=tensors.to_proto(mask_BS))
    unmasked = pb.ScoreRequest(tokens=tensors.to_proto(tokens_BS))
    generating = asyncio.create_task(answers(gateway.servicer, ask()))
    masked_BSV, plain_BSV = await asyncio.gather(
        score(gateway.servicer, request), score(gateway.servicer, unmasked)
    )
    await generating
    with torch.no_grad():
        assert torch.equal(masked_BSV, gateway.full(tokens_BS, attention_mask=mask_BS).logits)
        assert torch.equal(plain_BSV, gateway.full(tokens_BS).logits)


def wire(values: Any, dtype: torch.dtype = torch.int64) -> tensor_pb2.Tensor:
    return tensors.to_proto(torch.tensor(values, dtype=dtype))


@pytest.mark.parametrize(
    ("error", "field", "request_"),
    [
        (InvalidInput, "tokens", pb.ScoreRequest(tokens=wire([1, 2]))),
        (InvalidInput, "tokens", pb.ScoreRequest(tokens=wire([[1, 2]], torch.int32))),
        (InvalidInput, "tokens", pb.ScoreRequest(tokens=wire([[]]))),
        (InvalidInput, "tokens", pb.ScoreRequest(tokens=wire([[1, VOCAB_SIZE]]))),
        (InvalidInput, "tokens", pb.ScoreRequest(tokens=wire([[-1]]))),
        (InvalidInput, "tokens", pb.ScoreRequest(tokens=wire([[1] * 257]))),
        (InvalidInput, "tokens.dtype", pb.ScoreRequest()),
        (InvalidInput, "mask", pb.ScoreRequest(tokens=wire([[1, 2]]), mask=wire([[1]]))),
        (InvalidInput, "mask", pb.ScoreRequest(tokens=wire([[1]]), mask=wire([[2]]))),
        (MessageTooLarge, None, pb.ScoreRequest(tokens=wire([[1] * 250] * 5))),
    ],
)
async def test_wrong_scores_compute_nothing(
    idle: Gateway, error: type[ExpertMeshError], field: str | None, request_: pb.ScoreRequest
) -> None:
    with pytest.raises(error) as caught:
        await score(idle.servicer, request_)
    assert caught.value.fields.get("field") == field
    assert not idle.caller.calls


async def test_list_models(idle: Gateway) -> None:
    context: Any = None
    response = await idle.servicer.ListModels(router_pb2.ListModelsRequest(), context)
    assert list(response.models) == [idle.model.info]
