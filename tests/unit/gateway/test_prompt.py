"""A prompt's tokens, at no cost for other callers."""

import threading

import pytest

from expertmesh.runtime.errors import InvalidInput
from expertmesh.services.gateway.prompt import MAX_CHARS_PER_TOKEN, prompt_of
from expertmesh.services.gateway.sampling import Limits
from expertmesh.v1 import generate_pb2 as pb

LIMITS = Limits(vocab_size=100, max_positions=1000)


class Tokenizer:
    """Counts characters, and remembers where it ran."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def __call__(self, request: pb.GenerateRequest) -> list[int]:
        self.threads.append(threading.current_thread())
        return [len(request.text), *request.tokens.ids]


async def test_a_short_text_is_tokenised_on_the_spot() -> None:
    tokenize = Tokenizer()
    assert await prompt_of(pb.GenerateRequest(text="abc"), tokenize, LIMITS) == [3]
    assert tokenize.threads == [threading.current_thread()]


async def test_a_long_text_does_not_hold_others_up() -> None:
    tokenize = Tokenizer()
    assert await prompt_of(pb.GenerateRequest(text="x" * 20_000), tokenize, LIMITS) == [20_000]
    assert tokenize.threads != [threading.current_thread()]


async def test_a_text_that_cannot_fit_is_not_even_tokenised() -> None:
    tokenize = Tokenizer()
    text = "x" * (MAX_CHARS_PER_TOKEN * LIMITS.max_positions + 1)
    with pytest.raises(InvalidInput, match="fewer than 1000 tokens, got 64001 characters"):
        await prompt_of(pb.GenerateRequest(text=text), tokenize, LIMITS)
    assert tokenize.threads == []


async def test_ids_are_taken_as_they_are() -> None:
    request = pb.GenerateRequest(tokens=pb.TokenIds(ids=[5, 6]))
    assert await prompt_of(request, Tokenizer(), LIMITS) == [0, 5, 6]
