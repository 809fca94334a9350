"""Answers that are taken up where another call broke."""

from collections.abc import Sequence
from typing import Any

import pytest

from expertmesh.runtime.errors import InvalidInput
from expertmesh.services.gateway.answer import Answer, answer_to
from expertmesh.services.gateway.sampling import GenerationRequest
from expertmesh.services.gateway.text_stream import TextStream
from expertmesh.v1 import generate_pb2 as pb


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def taken_up(had: bytes, new: int = 9, **fields: Any) -> Answer:
    request = GenerationRequest((1, *had), new, len(had), **fields)
    return Answer(request, TextStream(decode, request.stop))


def test_text_that_is_out_does_not_come_again_and_text_held_back_does() -> None:
    assert taken_up(b"ab").step([ord("c")]).text == "c"
    first, *rest = "\u00e9".encode()
    assert taken_up(b"a" + bytes([first])).step(rest).text == "\u00e9"
    assert taken_up(b"ab", stop=("bX",)).step([ord("c")]).text == "bc"


def test_a_stop_string_over_the_break_is_found() -> None:
    message = taken_up(b"ab", stop=("bX",)).step([ord("X")])
    assert (message.text, message.finish_reason) == ("", pb.FINISH_REASON_STOP)


def test_positions_and_counts_are_the_whole_answers() -> None:
    message = taken_up(b"ab", new=1).step([ord("c")])
    assert (message.position, message.generated_tokens, message.prompt_tokens) == (2, 3, 1)
    assert message.finish_reason == pb.FINISH_REASON_LENGTH


@pytest.mark.parametrize("fields", [{"stop": ("b",)}, {"eos_ids": frozenset([ord("b")])}])
async def test_nothing_comes_after_the_end(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="got an answer that ends with its token 2"):
        taken_up(b"abc", **fields)


async def test_a_long_answer_is_taken_up_all_the_same() -> None:
    request = GenerationRequest(tuple(b"ab" * 500), 1, 998)
    assert (await answer_to(request, TextStream(decode))).num_tokens == 998
