"""A request alone in a packed forward gets the bits of a plain forward with transformers' cache."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.checkpoints import FAMILIES, tiny_model
from transformers import DynamicCache

from expertmesh.services.gateway.kv_cache import KeyValueBudget
from expertmesh.services.gateway.packed_attention import PackedModel, Part

PACKED = [f for f in FAMILIES if f not in {"deepseek_v2", "deepseek_v3", "jamba", "llama4"}]
WINDOWED = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "phimoe"]
PROMPT = [5, 17, 40, 90, 7, 200, 3, 11, 64, 65, 9]
NUM_STEPS = 6


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def plain(model: Any) -> list[torch.Tensor]:
    """Logits [V] of the prompt's last token, and of each greedy one after it."""
    cache = DynamicCache(config=model.config.get_text_config())
    ids, logits_NV = torch.tensor([PROMPT]), []
    for _ in range(NUM_STEPS):
        out = model(input_ids=ids, past_key_values=cache, logits_to_keep=1)  # as in generate
        logits_NV.append(out.logits[0, -1])
        ids = logits_NV[-1].argmax().view(1, 1)
    return logits_NV


def packed(model: Any) -> list[torch.Tensor]:
    """The same, of a part whose keys and values have to grow."""
    packs = PackedModel(model)
    budget = KeyValueBudget(packs.num_layers, max_tokens=64, page_size=4)
    kv, tokens, first, logits_NV = budget.new(), list(PROMPT), 0, []
    for _ in range(NUM_STEPS):
        assert budget.hold(kv, len(tokens), most=len(tokens))
        part = Part(kv, first, len(tokens) - first)
        logits_NV.append(packs.logits(tokens[first:], [part], [part.length - 1])[-1])
        first = len(tokens)
        tokens.append(int(logits_NV[-1].argmax()))
    return logits_NV


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "window"), [(f, None) for f in PACKED] + [(f, 6) for f in WINDOWED]
)
def test_a_request_alone_gets_the_bits_of_a_plain_forward(
    family: str, window: int | None, dtype: torch.dtype
) -> None:
    overrides = {} if window is None else {"sliding_window": window, "use_sliding_window": True}
    expected = plain(tiny_model(family, dtype=dtype, **overrides))
    found = packed(tiny_model(family, dtype=dtype, **overrides))
    assert [torch.equal(own, one) for own, one in zip(found, expected, strict=True)] == (
        [True] * NUM_STEPS
    )
