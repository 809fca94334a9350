"""The comparison itself: it must find every difference, and no others."""

from typing import Any

import pytest
import torch

from expertmesh.services import parity
from expertmesh.services.parity import Check, pad_left, print_verdict, random_prompts


def difference(expected: torch.Tensor, got: torch.Tensor) -> Check:
    """The comparison of two tensors."""
    return parity._difference("logits", expected, got)


def test_prompts_are_padded_on_the_left() -> None:
    padded = pad_left([[5, 6], [7, 8, 9], [4]], pad_id=0)
    assert padded.tokens_BS.tolist() == [[0, 5, 6], [7, 8, 9], [0, 0, 4]]
    assert padded.mask_BS.tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]
    assert padded.tokens_BS.dtype == padded.mask_BS.dtype == torch.int64


def test_padding_comes_off_again_even_where_a_token_looks_like_it() -> None:
    prompts = [[0, 6], [7, 0, 0], [0]]
    assert pad_left(prompts, pad_id=0).rows() == prompts


@pytest.mark.parametrize("vocab_size", [2, 4, 256])
def test_random_prompts_are_repeatable_and_of_several_lengths(vocab_size: int) -> None:
    first, again = random_prompts(vocab_size), random_prompts(vocab_size)
    assert torch.equal(first.tokens_BS, again.tokens_BS)
    assert tuple(map(len, first.rows())) == parity.PROMPT_LENGTHS
    assert len(set(parity.PROMPT_LENGTHS)) > 1
    assert all(0 <= token < vocab_size for row in first.rows() for token in row)
    if vocab_size > 4:
        assert not torch.equal(first.tokens_BS, random_prompts(vocab_size, seed=1).tokens_BS)
        assert min(token for row in first.rows() for token in row) >= 3


def test_equal_tensors_are_equal() -> None:
    logits = torch.randn(2, 3)
    assert difference(logits, logits.clone()) == Check("logits", True, "6 values bit-equal")


def test_one_last_bit_is_a_difference() -> None:
    expected = torch.ones(2, 2)
    got = expected.clone()
    got[1, 1] = torch.nextafter(got[1, 1], torch.tensor(2.0))
    check = difference(expected, got)
    assert not check.equal
    assert check.detail == "25.0% of values differ, by 1.2e-07 at most"


@pytest.mark.parametrize(
    ("got", "detail"),
    [
        (torch.zeros(2, 3, dtype=torch.bfloat16), "torch.bfloat16[2, 3] instead of "),
        (torch.zeros(2, 3, dtype=torch.float64), "torch.float64[2, 3] instead of "),
        (torch.zeros(3, 2), "torch.float32[3, 2] instead of "),
        (torch.zeros(1, 3), "torch.float32[1, 3] instead of "),
    ],
)
def test_equal_values_of_another_form_are_a_difference(got: torch.Tensor, detail: str) -> None:
    check = difference(torch.zeros(2, 3), got)
    assert not check.equal
    assert check.detail == f"{detail}torch.float32[2, 3]"


def test_nan_is_a_difference() -> None:
    assert not difference(torch.zeros(2), torch.tensor([0.0, float("nan")])).equal


def test_the_verdict_needs_every_check(capsys: pytest.CaptureFixture[Any]) -> None:
    equal, other = Check("a", True, "fine"), Check("b", False, "3% differ")
    assert print_verdict([equal, equal]) is True
    assert print_verdict([equal, other, equal]) is False
    assert "DIFFERENT  b: 3% differ\n" in capsys.readouterr().out
