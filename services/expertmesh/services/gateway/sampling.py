"""What a Generate call asks for, checked field by field before anything is computed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from expertmesh.runtime.errors import InvalidInput
from expertmesh.runtime.origin import ANYONE, Origin
from expertmesh.services.forward_scope import RoutingOptions
from expertmesh.v1 import generate_pb2 as pb

DEFAULT_MAX_NEW_TOKENS = 256
MIN_TEMPERATURE = 1e-6
"""Below this, dividing logits overflows float32."""
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Limits:
    """What the served model and this gateway can take."""

    vocab_size: int
    max_positions: int
    """Tokens of prompt and answer together."""
    max_stop_strings: int = 16
    max_stop_chars: int = 256


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to go on from it; every value is valid and final.

    Temperature, top_k (0 keeps all tokens) and top_p mean nothing unless `do_sample`.
    """

    prompt: tuple[int, ...]
    """With the tokens of the answer that the caller already has at its end."""
    max_new_tokens: int
    """Beside those."""
    num_generated: int = 0
    """How many of the prompt's tokens those are."""
    eos_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    routing: RoutingOptions = field(default_factory=RoutingOptions)
    origin: Origin = ANYONE

    @property
    def num_tokens(self) -> int:
        """Of the prompt and the longest answer."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def generated(self) -> tuple[int, ...]:
        """What the caller already has of the answer."""
        return self.prompt[len(self.prompt) - self.num_generated :]


def limits_of(model: Any, max_positions: int | None = None) -> Limits:
    """The limits of a transformers model, with at most `max_positions` tokens per request."""
    config = model.config.get_text_config()
    bounds = [getattr(config, "max_position_embeddings", None), max_positions]
    known = [bound for bound in bounds if bound is not None]
    return Limits(vocab_size=config.vocab_size, max_positions=min(known, default=2**31))


def to_request(
    message: pb.GenerateRequest, prompt: Sequence[int], defaults: Any, limits: Limits
) -> GenerationRequest:
    """The request a message stands for.

    Args:
        message: unset sampling fields take `defaults`.
        prompt: the message's tokens, or its text tokenised.
        defaults: the model's `transformers.GenerationConfig`.

    Raises:
        InvalidInput: names the field.
    """
    generated = message.generated.ids
    _check_tokens("tokens.ids", prompt, limits)
    _check_tokens("generated.ids", generated, limits)
    _check_length(prompt, limits)
    sampling = message.sampling
    top_k = sampling.top_k if sampling.HasField("top_k") else _default(defaults, "top_k", 50)
    seed = sampling.seed if sampling.HasField("seed") else None
    if seed is not None and seed > MAX_SEED:
        raise InvalidInput.of("sampling.seed", expected=f"at most {MAX_SEED}", got=seed)
    if seed is not None and generated:
        raise InvalidInput.of("generated", expected="no seed beside it", got=f"seed {seed}")
    max_new_tokens = _max_new_tokens(message.max_new_tokens, len(prompt), defaults, limits)
    if len(generated) >= max_new_tokens:
        expected = f"fewer than the {max_new_tokens} tokens to generate"
        raise InvalidInput.of("generated", expected=expected, got=len(generated))
    return GenerationRequest(
        prompt=(*prompt, *generated),
        max_new_tokens=max_new_tokens - len(generated),
        num_generated=len(generated),
        eos_ids=frozenset() if message.ignore_eos else eos_ids_of(defaults),
        stop=_stop(message.stop, limits),
        do_sample=sampling.do_sample,
        temperature=_temperature(sampling, defaults),
        top_k=min(int(top_k), limits.vocab_size),
        top_p=_top_p(sampling, defaults),
        seed=seed,
    )


def eos_ids_of(defaults: Any) -> frozenset[int]:
    """The end-of-sequence tokens of a `transformers.GenerationConfig`: none, one or several."""
    eos = defaults.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def _default(defaults: Any, name: str, otherwise: float) -> float:
    value = getattr(defaults, name, None)
    return otherwise if value is None else value


def _check_tokens(field: str, ids: Sequence[int], limits: Limits) -> None:
    largest = max(ids, default=0)
    if largest >= limits.vocab_size:
        raise InvalidInput.of(
            field, expected=f"ids below the vocabulary size {limits.vocab_size}", got=largest
        )


def _check_length(prompt: Sequence[int], limits: Limits) -> None:
    if not prompt:
        raise InvalidInput.of("prompt", expected="at least one token", got="none")
    if len(prompt) >= limits.max_positions:
        raise InvalidInput.of(
            "prompt",
            expected=f"fewer than {limits.max_positions} tokens",
            got=len(prompt),
            hint="Shorten the prompt.",
        )


def _max_new_tokens(asked: int, prompt_len: int, defaults: Any, limits: Limits) -> int:
    room = limits.max_positions - prompt_len
    if not asked:
        return min(int(_default(defaults, "max_new_tokens", DEFAULT_MAX_NEW_TOKENS)), room)
    if asked > room:
        raise InvalidInput.of(
            "max_new_tokens",
            expected=f"at most {room} ({limits.max_positions} positions less the prompt)",
            got=asked,
        )
    return asked


def _temperature(sampling: pb.SamplingParams, defaults: Any) -> float:
    if not sampling.HasField("temperature"):
        return float(_default(defaults, "temperature", 1.0))
    temperature = sampling.temperature
    if not MIN_TEMPERATURE <= temperature < math.inf:
        raise InvalidInput.of(
            "sampling.temperature",
            expected=f"a finite number, at least {MIN_TEMPERATURE}",
            got=temperature,
            hint="For greedy decoding leave do_sample unset.",
        )
    return temperature


def _top_p(sampling: pb.SamplingParams, defaults: Any) -> float:
    if not sampling.HasField("top_p"):
        return float(_default(defaults, "top_p", 1.0))
    if not 0 < sampling.top_p <= 1:
        raise InvalidInput.of("sampling.top_p", expected="a number in (0, 1]", got=sampling.top_p)
    return sampling.top_p


def _stop(stop: Sequence[str], limits: Limits) -> tuple[str, ...]:
    if len(stop) > limits.max_stop_strings:
        expected = f"at most {limits.max_stop_strings} strings"
        raise InvalidInput.of("stop", expected=expected, got=len(stop))
    for index, text in enumerate(stop):
        if not 1 <= len(text) <= limits.max_stop_chars:
            expected = f"1 to {limits.max_stop_chars} characters"
            raise InvalidInput.of(f"stop[{index}]", expected=expected, got=f"{len(text)}")
    return tuple(stop)
