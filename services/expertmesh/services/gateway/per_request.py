"""Sampling parameters that differ between the requests of one continuous batch.

transformers decides greedy or sampling per batch and builds processors from one configuration.
Here a batch samples if any request does, and the last processor leaves greedy ones a single choice.
Shape suffixes: B requests with a new token, V vocabulary; arguments are int32 [at least B].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopKLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)

from expertmesh.services.gateway.sampling import GenerationRequest


class _TopK(ContinuousBatchingTopKLogitsWarper):  # type: ignore[misc]
    """Without the sort when no request asks for it."""

    def __call__(self, scores_BV: torch.Tensor, arg: torch.Tensor) -> torch.Tensor:
        num_requests, vocab_size = scores_BV.shape
        if bool((arg[:num_requests] >= vocab_size).all()):
            return scores_BV
        kept_BV: torch.Tensor = super().__call__(scores_BV, arg)
        return kept_BV


class _TopP(ContinuousBatchingTopPLogitsWarper):  # type: ignore[misc]
    """Without the sort when no request asks for it."""

    def __call__(self, scores_BV: torch.Tensor, arg: torch.Tensor) -> torch.Tensor:
        if bool((arg[: scores_BV.shape[0]].view(torch.float32) >= 1).all()):
            return scores_BV
        kept_BV: torch.Tensor = super().__call__(scores_BV, arg)
        return kept_BV


class _Greedy(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Leaves greedy requests their first best token, so that drawing from them is argmax.

    Also for rows whose best score is NaN or infinite: drawing from those raises for the batch, and
    the other requests have nothing to do with it.
    """

    supported_kwargs = {"greedy": bool}  # noqa: RUF012  (as in the base class)
    ignored_kwargs = ()

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.fill_(1)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        flags = [
            r.state.logit_processor_kwargs.get("greedy", True) for r in requests_with_new_token
        ]
        return torch.tensor(flags, dtype=torch.int32)

    def __call__(self, scores_BV: torch.Tensor, arg: torch.Tensor) -> torch.Tensor:
        greedy_B = arg[: scores_BV.shape[0]].bool() | ~scores_BV.amax(dim=-1).isfinite()
        best_B1 = scores_BV.argmax(dim=-1, keepdim=True)
        only_best_BV = torch.full_like(scores_BV, -torch.inf).scatter_(1, best_B1, 0.0)
        return torch.where(greedy_B.unsqueeze(-1), only_best_BV, scores_BV)


@dataclass(frozen=True)
class _State:
    logit_processor_kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Drawn:
    """A request as transformers' processors see it."""

    state: _State
    has_new_token: bool = True


def per_request_processors(vocab_size: int) -> Any:
    """A `ContinuousBatchingLogitsProcessorList` that reads `sampling_kwargs` of each request."""
    processors = [
        ContinuousBatchingTemperatureLogitsWarper(TemperatureLogitsWarper(1.0)),
        _TopK(TopKLogitsWarper(vocab_size)),
        _TopP(TopPLogitsWarper(1.0)),
        _Greedy(),
    ]
    found = ContinuousBatchingLogitsProcessorList(LogitsProcessorList(processors))
    found.tensors_required = len(processors)  # counted only for those it converts itself
    return found


def sampling_kwargs(request: GenerationRequest, vocab_size: int) -> dict[str, Any]:
    """The keyword arguments of `add_request` that those processors understand."""
    if not request.do_sample:
        return {"greedy": True, "temperature": 1.0, "top_k": vocab_size, "top_p": 1.0}
    return {
        "greedy": False,
        "temperature": request.temperature,
        "top_k": request.top_k or vocab_size,
        "top_p": request.top_p,
    }


def next_tokens(
    logits_BV: torch.Tensor, requests: Sequence[GenerationRequest], vocab_size: int
) -> list[int]:
    """The best token of greedy requests, a drawn one of the others."""
    if not any(request.do_sample for request in requests):
        best: list[int] = logits_BV.argmax(dim=-1).tolist()
        return best
    states = [_Drawn(_State(sampling_kwargs(request, vocab_size))) for request in requests]
    processors = per_request_processors(vocab_size)
    args = torch.zeros(processors.tensors_required, len(requests), dtype=torch.int32)
    processors.prepare_tensor_args(states, args)
    kept_BV = processors(None, logits_BV.float(), args.to(logits_BV.device))
    drawn: list[int] = torch.multinomial(kept_BV.softmax(dim=-1), 1).flatten().tolist()
    return drawn
