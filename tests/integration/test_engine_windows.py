"""Sliding windows, prompts in pieces and the pace of the stream, over real tiny models."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.checkpoints import tiny_model
from tests.local_experts import LocalExperts

from expertmesh.client.hooks import attach_caller
from expertmesh.services.gateway.continuous import ContinuousEngine
from expertmesh.services.gateway.engine_config import EngineConfig
from expertmesh.services.gateway.sampling import GenerationRequest

WINDOW = 8
NUM_NEW = 24
CONFIG = EngineConfig(max_batch_tokens=64, kv_cache_tokens=256, page_size=16)
PROMPTS = [tuple(range(3, 3 + length)) for length in (5, 21, 40)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@dataclass(frozen=True)
class Served:
    full: Any
    engine: ContinuousEngine

    def generate(self, prompt: tuple[int, ...]) -> list[int]:
        options = {"max_new_tokens": NUM_NEW, "eos_token_id": None, "pad_token_id": 0}
        out_1S = self.full.generate(torch.tensor([prompt]), do_sample=False, **options)
        tokens: list[int] = out_1S[0, len(prompt) :].tolist()
        return tokens

    async def steps(self, prompt: tuple[int, ...], **fields: Any) -> list[list[int]]:
        asked = replace(GenerationRequest(prompt, NUM_NEW), **fields)
        return [tokens async for tokens in self.engine.submit(asked)]


@asynccontextmanager
async def served(family: str, config: EngineConfig, **overrides: Any) -> AsyncIterator[Served]:
    full, model = tiny_model(family, **overrides), tiny_model(family, **overrides)
    engine = ContinuousEngine(attach_caller(model, LocalExperts.of(full)), config)
    await engine.start()
    try:
        yield Served(full, engine)
    finally:
        await engine.close()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("max_batch_tokens", [64, 16])
async def test_windows_slide_as_in_generate(family: str, max_batch_tokens: int) -> None:
    config = replace(CONFIG, max_batch_tokens=max_batch_tokens)
    async with served(family, config, sliding_window=WINDOW, use_sliding_window=True) as model:
        answers = await asyncio.gather(*(model.steps(prompt) for prompt in PROMPTS))
        for prompt, steps in zip(PROMPTS, answers, strict=True):
            assert [token for step in steps for token in step] == model.generate(prompt)


async def test_tokens_between_the_first_and_the_last_travel_together() -> None:
    async with served("mixtral", replace(CONFIG, stream_interval_s=60.0)) as model:
        steps = await model.steps(PROMPTS[0])
        assert [len(tokens) for tokens in steps] == [1, NUM_NEW - 1]


async def test_without_an_interval_each_step_sends_its_token() -> None:
    async with served("mixtral", replace(CONFIG, stream_interval_s=0.0)) as model:
        assert sum(map(len, await model.steps(PROMPTS[0]))) == NUM_NEW
