"""Engines over real tiny models: tokens as generate's, isolation of failures, slots, closing."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.checkpoints import FAMILIES, tiny_model
from tests.local_experts import LocalExperts
from tests.waiting import until

from expertmesh.client.hooks import attach_caller
from expertmesh.client.skeleton import share_skeleton
from expertmesh.runtime.errors import (
    Draining,
    ExpertUnavailable,
    InsufficientMemory,
    InternalError,
    QueueFull,
)
from expertmesh.services.gateway.continuous import ContinuousEngine
from expertmesh.services.gateway.engine import Engine
from expertmesh.services.gateway.engine_config import EngineConfig
from expertmesh.services.gateway.exact import ExactEngine
from expertmesh.services.gateway.sampling import GenerationRequest

CONTINUOUS = [f for f in FAMILIES if f not in {"deepseek_v2", "deepseek_v3", "jamba", "llama4"}]
CONFIG = EngineConfig(max_batch_tokens=64, kv_cache_tokens=256, page_size=16)
PROMPTS = [(5, 17, 40, 90, 7), (200, 3, 11), (9, 8, 7, 6, 5, 4, 3, 77, 120), (31,) * 14]
NUM_NEW = 12
Kind = type[ContinuousEngine] | type[ExactEngine]
BOTH: list[Kind] = [ContinuousEngine, ExactEngine]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@dataclass(frozen=True)
class Served:
    """A full model, and the same model with its experts behind a caller."""

    full: Any
    skeleton: Any
    caller: LocalExperts

    def generate(self, prompt: tuple[int, ...], **options: Any) -> list[int]:
        """What the user's own script gets."""
        options = {"max_new_tokens": NUM_NEW, "eos_token_id": None, "pad_token_id": 0} | options
        options = {"do_sample": False} | options
        ids = torch.tensor([prompt])
        tokens: list[int] = self.full.generate(ids, **options)[0, len(prompt) :].tolist()
        return tokens


def served(family: str = "mixtral") -> Served:
    full, model = tiny_model(family), tiny_model(family)
    caller = LocalExperts.of(full)
    return Served(full, attach_caller(model, caller), caller)


@asynccontextmanager
async def running(
    kind: Kind, model: Served, config: EngineConfig = CONFIG
) -> AsyncIterator[Engine]:
    engine: Engine = kind(share_skeleton(model.skeleton), config)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def request(prompt: tuple[int, ...] = PROMPTS[0], **fields: Any) -> GenerationRequest:
    return replace(GenerationRequest(prompt=prompt, max_new_tokens=NUM_NEW), **fields)


def flat(steps: list[list[int]]) -> list[int]:
    return [token for step in steps for token in step]


async def steps_of(engine: Engine, asked: GenerationRequest) -> list[list[int]]:
    return [tokens async for tokens in engine.submit(asked)]


async def tokens_of(engine: Engine, asked: GenerationRequest) -> list[int]:
    return flat(await steps_of(engine, asked))


@pytest.mark.parametrize("family", CONTINUOUS)
async def test_concurrent_prompts_share_forwards_and_get_generates_tokens(family: str) -> None:
    model = served(family)
    async with running(ContinuousEngine, model) as engine:
        answers = await asyncio.gather(*(steps_of(engine, request(p)) for p in PROMPTS))
    for prompt, steps in zip(PROMPTS, answers, strict=True):
        assert flat(steps) == model.generate(prompt)
        assert len(steps) > 1
    num_forwards = len(model.caller.calls) / len(model.caller.layers)
    assert num_forwards < len(PROMPTS) * NUM_NEW / 2


async def test_exact_engine_serves_jamba_in_turn() -> None:
    model = served("jamba")
    async with running(ExactEngine, model) as engine:
        answers = await asyncio.gather(*(steps_of(engine, request(p)) for p in PROMPTS[:2]))
    assert [flat(steps) for steps in answers] == [model.generate(p) for p in PROMPTS[:2]]
    assert [len(steps) > 1 for steps in answers] == [True, True]


@pytest.mark.parametrize("kind", BOTH)
async def test_end_of_sequence_token_is_the_last(kind: Kind) -> None:
    model = served()
    expected = model.generate(PROMPTS[0])
    eos = expected[4]
    async with running(kind, model) as engine:
        tokens = await tokens_of(engine, request(eos_ids=frozenset([eos, 255])))
    assert tokens == expected[: expected.index(eos) + 1]


@pytest.mark.parametrize("kind", BOTH)
async def test_without_eos_ids_generation_goes_past_the_models_own(kind: Kind) -> None:
    model = served()
    expected = model.generate(PROMPTS[0])
    model.skeleton.generation_config.eos_token_id = expected[4]
    async with running(kind, model) as engine:
        assert await tokens_of(engine, request()) == expected


@pytest.mark.parametrize("kind", BOTH)
async def test_closing_the_iterator_frees_the_slot(kind: Kind) -> None:
    model = served()
    config = replace(CONFIG, max_running=1, max_waiting=0)
    async with running(kind, model, config) as engine:
        async with aclosing(engine.submit(request(max_new_tokens=200))) as steps:
            await anext(steps)
        before = len(model.caller.calls)
        tokens = await tokens_of(engine, request(PROMPTS[1]))
        assert tokens == model.generate(PROMPTS[1])
        # the second would wait for the 200 of the first; some were under way when it ended
        num_forwards = (len(model.caller.calls) - before) / len(model.caller.layers)
        assert num_forwards < NUM_NEW + 50


@pytest.mark.parametrize("kind", BOTH)
async def test_an_expert_failure_is_typed_and_the_next_request_works(kind: Kind) -> None:
    model = served()
    failure = ExpertUnavailable("no replica holds layer 1 expert 3", layer=1, expert=3)
    async with running(kind, model) as engine:
        model.caller.errors[5] = failure  # the third forward
        seen: list[int] = []

        async def consume() -> None:
            async for tokens in engine.submit(request()):
                seen.extend(tokens)

        with pytest.raises(ExpertUnavailable) as caught:
            await consume()
        assert caught.value.fields == failure.fields
        assert seen == model.generate(PROMPTS[0])[:2]
        assert engine.is_alive()
        assert await tokens_of(engine, request()) == model.generate(PROMPTS[0])


async def test_a_failed_batch_takes_its_requests_with_it_but_not_those_waiting() -> None:
    model = served()
    config = replace(CONFIG, max_running=2)
    async with running(ContinuousEngine, model, config) as engine:
        asked = [asyncio.create_task(tokens_of(engine, request(p))) for p in PROMPTS[:3]]
        await until(lambda: len(model.caller.calls) > 3)
        model.caller.errors[len(model.caller.calls) + 6] = ExpertUnavailable("gone")
        *together, last = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in together] == [ExpertUnavailable] * 2
        assert together[0] is not together[1]
        assert last == model.generate(PROMPTS[2])


@pytest.mark.parametrize("kind", BOTH)
async def test_a_bug_is_an_internal_error_and_in_the_log(
    kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    model = served()
    async with running(kind, model) as engine:
        model.caller.errors[0] = ZeroDivisionError("secret detail")
        with pytest.raises(InternalError) as caught:
            await tokens_of(engine, request())
        assert "secret" not in str(caught.value)
        assert "secret detail" in caplog.text
        assert await tokens_of(engine, request()) == model.generate(PROMPTS[0])


@pytest.mark.parametrize("kind", BOTH)
async def test_too_many_requests_are_refused_at_once(kind: Kind) -> None:
    model = served()
    async with running(kind, model, replace(CONFIG, max_running=1, max_waiting=1)) as engine:
        asked = [asyncio.create_task(tokens_of(engine, request())) for _ in range(3)]
        *accepted, refused = await asyncio.gather(*asked, return_exceptions=True)
        assert accepted == [model.generate(PROMPTS[0])] * 2
        assert isinstance(refused, QueueFull)
        assert await tokens_of(engine, request()) == accepted[0]


@pytest.mark.parametrize("kind", BOTH)
async def test_closing_lets_running_requests_end(kind: Kind) -> None:
    model = served()
    engine: Engine = kind(share_skeleton(model.skeleton), CONFIG)
    await engine.start()
    asked = asyncio.create_task(tokens_of(engine, request()))
    await until(lambda: bool(model.caller.calls))
    await engine.close(drain_s=30)
    assert await asked == model.generate(PROMPTS[0])
    assert not engine.is_alive()
    with pytest.raises(Draining):
        await tokens_of(engine, request())


@pytest.mark.parametrize("kind", BOTH)
async def test_closing_at_once_fails_what_runs(kind: Kind) -> None:
    model = served()
    engine: Engine = kind(share_skeleton(model.skeleton), CONFIG)
    await engine.start()
    asked = asyncio.create_task(tokens_of(engine, request(max_new_tokens=240)))
    await until(lambda: bool(model.caller.calls))
    await engine.close()
    with pytest.raises(Draining):
        await asked


async def test_more_tokens_than_the_cache_holds_still_get_their_answers() -> None:
    model = served()
    prompts = [(index + 3,) * 20 for index in range(4)]
    num_new = 40
    config = replace(CONFIG, kv_cache_tokens=96)  # one and a half requests
    async with running(ContinuousEngine, model, config) as engine:
        asked = [request(prompt, max_new_tokens=num_new) for prompt in prompts]
        answers = await asyncio.gather(*(tokens_of(engine, each) for each in asked))
    assert answers == [model.generate(prompt, max_new_tokens=num_new) for prompt in prompts]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
async def test_a_request_may_fill_the_whole_cache(family: str) -> None:
    model = served(family)
    async with running(ContinuousEngine, model) as engine:
        assert engine.max_positions == CONFIG.kv_cache_tokens
        prompt = (7,) * (CONFIG.kv_cache_tokens - NUM_NEW)
        assert len(await tokens_of(engine, request(prompt))) == NUM_NEW


async def test_a_cache_that_does_not_fit_is_said_at_start() -> None:
    engine = ContinuousEngine(served().skeleton, replace(CONFIG, kv_cache_tokens=2**40))
    with pytest.raises(InsufficientMemory, match="kv_cache_tokens"):
        await engine.start()


async def test_greedy_and_sampling_requests_share_a_batch() -> None:
    model = served()
    forced = request(do_sample=True, temperature=5.0, top_k=1)
    nucleus = request(do_sample=True, top_p=1e-6)
    free = request(do_sample=True, temperature=5.0)
    async with running(ContinuousEngine, model) as engine:
        asked = [request(), forced, nucleus, free]
        answers = await asyncio.gather(*(tokens_of(engine, each) for each in asked))
    expected = model.generate(PROMPTS[0])
    assert [answer == expected for answer in answers] == [True, True, True, False]


async def test_exact_engine_honours_the_seed_and_forgets_it() -> None:
    model = served()
    drawn = request(do_sample=True, temperature=2.0, top_k=50, top_p=0.9)
    async with running(ExactEngine, model) as engine:
        seeded = [await tokens_of(engine, replace(drawn, seed=3)) for _ in range(2)]
        unseeded = await tokens_of(engine, drawn)
        await tokens_of(engine, replace(drawn, seed=3))
        unseeded_again = await tokens_of(engine, drawn)
    torch.manual_seed(3)
    options = {"do_sample": True, "temperature": 2.0, "top_k": 50, "top_p": 0.9}
    assert seeded == [model.generate(PROMPTS[0], **options)] * 2
    assert unseeded != unseeded_again
