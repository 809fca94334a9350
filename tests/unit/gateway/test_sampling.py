"""What a Generate message becomes, and which field an error names."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from tests.checkpoints import tiny_model
from transformers import GenerationConfig

from expertmesh.runtime.errors import InvalidInput
from expertmesh.services.gateway.sampling import (
    DEFAULT_MAX_NEW_TOKENS,
    GenerationRequest,
    Limits,
    limits_of,
    to_request,
)
from expertmesh.v1 import generate_pb2 as pb

LIMITS = Limits(vocab_size=100, max_positions=1000, max_stop_strings=2, max_stop_chars=5)


def convert(
    prompt: Sequence[int] = (1, 2),
    defaults: GenerationConfig | None = None,
    limits: Limits = LIMITS,
    sampling: dict[str, Any] | None = None,
    **fields: Any,
) -> GenerationRequest:
    message = pb.GenerateRequest(sampling=pb.SamplingParams(**(sampling or {})), **fields)
    return to_request(message, prompt, defaults or GenerationConfig(), limits)


def test_given_values_are_taken() -> None:
    request = convert(
        sampling={"do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.25, "seed": 3},
        max_new_tokens=9,
        stop=["x"],
    )
    assert request == GenerationRequest(
        prompt=(1, 2),
        max_new_tokens=9,
        stop=("x",),
        do_sample=True,
        temperature=0.5,
        top_k=7,
        top_p=0.25,
        seed=3,
    )


def test_unset_fields_take_the_models_defaults_else_transformers() -> None:
    defaults = GenerationConfig(temperature=0.7, top_k=3, max_new_tokens=11, eos_token_id=[4, 5])
    request = convert(defaults=defaults)
    assert (request.temperature, request.top_k, request.top_p) == (0.7, 3, 1.0)
    assert request.max_new_tokens == 11
    assert request.eos_ids == {4, 5}
    plain = convert()
    assert (plain.temperature, plain.top_k, plain.top_p) == (1.0, 50, 1.0)
    assert plain.max_new_tokens == DEFAULT_MAX_NEW_TOKENS
    assert plain.eos_ids == frozenset()


def test_default_length_fits_what_the_prompt_leaves() -> None:
    assert convert(prompt=[1] * 990).max_new_tokens == 10


def test_ignore_eos_and_single_eos() -> None:
    defaults = GenerationConfig(eos_token_id=4)
    assert convert(defaults=defaults).eos_ids == {4}
    assert convert(defaults=defaults, ignore_eos=True).eos_ids == frozenset()


def test_zero_top_k_keeps_all_and_more_than_the_vocabulary_is_the_vocabulary() -> None:
    assert convert(sampling={"top_k": 0}).top_k == 0
    assert convert(sampling={"top_k": 2**31}).top_k == LIMITS.vocab_size


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [1] * 1000}),
        ("tokens.ids", {"prompt": [1, 100]}),
        ("max_new_tokens", {"max_new_tokens": 999}),
        ("sampling.temperature", {"sampling": {"temperature": 0.0}}),
        ("sampling.temperature", {"sampling": {"temperature": -1.0}}),
        ("sampling.temperature", {"sampling": {"temperature": 1e-30}}),
        ("sampling.temperature", {"sampling": {"temperature": math.inf}}),
        ("sampling.temperature", {"sampling": {"temperature": math.nan}}),
        ("sampling.top_p", {"sampling": {"top_p": 0.0}}),
        ("sampling.top_p", {"sampling": {"top_p": 1.5}}),
        ("sampling.top_p", {"sampling": {"top_p": math.nan}}),
        ("sampling.seed", {"sampling": {"seed": 2**63}}),
        ("stop", {"stop": ["a", "b", "c"]}),
        ("stop[1]", {"stop": ["a", ""]}),
        ("stop[0]", {"stop": ["abcdef"]}),
    ],
)
def test_wrong_values_name_the_field(field: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        convert(**arguments)
    assert caught.value.fields["field"] == field
    assert field in str(caught.value)


def test_boundaries_are_allowed() -> None:
    request = convert(prompt=[99] * 998, max_new_tokens=2, sampling={"top_p": 1.0}, stop=["abcde"])
    assert request.max_new_tokens == 2


def test_limits_are_the_models_or_the_engines_if_smaller() -> None:
    model = tiny_model("mixtral")
    assert limits_of(model) == Limits(vocab_size=256, max_positions=512)
    assert limits_of(model, 100).max_positions == 100
    assert limits_of(model, 10_000).max_positions == 512


def test_what_the_caller_has_is_part_of_the_prompt_and_of_the_answer() -> None:
    request = convert(max_new_tokens=9, generated=pb.TokenIds(ids=[3, 4]))
    assert request.prompt == (1, 2, 3, 4)
    assert (request.max_new_tokens, request.generated) == (7, (3, 4))
    assert request.num_tokens == convert(max_new_tokens=9).num_tokens


@pytest.mark.parametrize(
    ("ids", "fields", "message"),
    [
        ([100], {}, r"generated\.ids: expected ids below the vocabulary size 100, got 100"),
        ([5] * 9, {}, "generated: expected fewer than the 9 tokens to generate, got 9"),
        ([5], {"sampling": {"seed": 3}}, "generated: expected no seed beside it, got seed 3"),
    ],
)
def test_what_cannot_be_taken_up(ids: list[int], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        convert(max_new_tokens=9, generated=pb.TokenIds(ids=ids), **fields)
