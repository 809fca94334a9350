"""Each row of a mixed batch is processed as transformers processes it alone."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from expertmesh.services.gateway.per_request import per_request_processors, sampling_kwargs
from expertmesh.services.gateway.sampling import GenerationRequest

VOCAB_SIZE = 50
REQUESTS = [
    GenerationRequest((1,), 1),
    GenerationRequest((1,), 1, do_sample=True, temperature=0.5, top_k=7, top_p=0.8),
    GenerationRequest((1,), 1, do_sample=True, temperature=3.0),
    GenerationRequest((1,), 1, do_sample=True, top_p=0.3),
]


def process(requests: list[GenerationRequest], scores_BV: torch.Tensor) -> torch.Tensor:
    """Probabilities [B, V] after the processors."""
    processors = per_request_processors(VOCAB_SIZE)
    states = [
        SimpleNamespace(
            has_new_token=True,
            state=SimpleNamespace(logit_processor_kwargs=sampling_kwargs(each, VOCAB_SIZE)),
        )
        for each in requests
    ]
    for state in states:
        processors.check_kwargs(state.state.logit_processor_kwargs)
    args = torch.zeros(processors.tensors_required, 8, dtype=torch.int32)
    processors.prepare_tensor_args(states, args)
    kept_BV: torch.Tensor = processors(None, scores_BV.clone(), args)
    return kept_BV.softmax(dim=-1)


def alone(request: GenerationRequest, scores_V: torch.Tensor) -> torch.Tensor:
    """Probabilities [V] by transformers' own processors."""
    if not request.do_sample:
        return torch.nn.functional.one_hot(scores_V.argmax(), VOCAB_SIZE).float()
    scores_1V = TemperatureLogitsWarper(request.temperature)(None, scores_V[None])
    if request.top_k:
        scores_1V = TopKLogitsWarper(request.top_k)(None, scores_1V)
    scores_1V = TopPLogitsWarper(request.top_p)(None, scores_1V)
    kept_V: torch.Tensor = scores_1V.softmax(dim=-1)[0]
    return kept_V


@pytest.mark.parametrize("requests", [REQUESTS, REQUESTS[:1], REQUESTS[2:3]])
def test_rows_are_as_processed_alone(requests: list[GenerationRequest]) -> None:
    generator = torch.Generator().manual_seed(0)
    scores_BV = torch.randn(len(requests), VOCAB_SIZE, generator=generator) * 3
    expected = [alone(each, row) for each, row in zip(requests, scores_BV, strict=True)]
    torch.testing.assert_close(process(requests, scores_BV), torch.stack(expected))


def test_greedy_takes_the_first_of_equals() -> None:
    scores_BV = torch.zeros(1, VOCAB_SIZE)
    scores_BV[0, [7, 9]] = 1.0
    assert process(REQUESTS[:1], scores_BV)[0].tolist() == [
        float(i == 7) for i in range(VOCAB_SIZE)
    ]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_does_not_spoil_the_others(bad: float) -> None:
    scores_BV = torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    good = alone(REQUESTS[2], scores_BV[1])
    scores_BV[0, 3] = bad
    kept_BV = process([REQUESTS[2], REQUESTS[2]], scores_BV)
    assert torch.multinomial(kept_BV, 1)[0] == 3
    torch.testing.assert_close(kept_BV[1], good)
