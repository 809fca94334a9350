"""A routed call is checked before anything is sent: one typed error for each wrong tensor."""

from typing import Any

import pytest
import torch

from expertmesh.router.validate import MAX_TOP_K, check_finite, check_hidden, check_routing
from expertmesh.runtime.errors import (
    ExpertMeshError,
    InvalidInput,
    NonFiniteInput,
    UnknownExpert,
)

NUM_EXPERTS = {1: 8, 3: 40}


def call(**changes: Any) -> dict[str, Any]:
    """Arguments of a good call with `changes`: T 3, D 4, K 2."""
    good: dict[str, Any] = {
        "layer": 1,
        "hidden_TD": torch.zeros(3, 4),
        "experts_TK": torch.tensor([[0, 7], [1, 2], [3, 0]]),
        "weights_TK": torch.ones(3, 2),
        "num_experts": NUM_EXPERTS,
    }
    return good | changes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts_TK": torch.zeros(3, 2, dtype=torch.int32)},
        {"hidden_TD": torch.zeros(3, 4, dtype=torch.bfloat16)},
        {"hidden_TD": torch.zeros(3, 4).half(), "weights_TK": torch.ones(3, 2).half()},
        {"experts_TK": torch.ones(3, 1).long(), "weights_TK": torch.ones(3, 1)},
        {
            "layer": 3,
            "experts_TK": torch.arange(24, 40).expand(3, MAX_TOP_K),
            "weights_TK": torch.ones(3, MAX_TOP_K),
        },
    ],
)
def test_good_calls_pass(changes: dict[str, Any]) -> None:
    check_routing(**call(**changes))


Wrong = tuple[dict[str, Any], type[ExpertMeshError], str]

WRONG_HIDDEN: list[Wrong] = [
    ({"layer": 2}, UnknownExpert, "layer 2: the model's MoE layers are 1, 3"),
    (
        {"hidden_TD": torch.zeros(0, 4)},
        InvalidInput,
        "hidden.shape: expected [T, D] with T at least 1, got [0, 4].",
    ),
    ({"hidden_TD": torch.zeros(4)}, InvalidInput, "hidden.shape: "),
    ({"hidden_TD": torch.zeros(1, 3, 4)}, InvalidInput, "hidden.shape: "),
    (
        {"hidden_TD": torch.zeros(3, 4).long()},
        InvalidInput,
        "hidden.dtype: expected a floating-point dtype, got int64.",
    ),
]
WRONG_ROUTING: list[Wrong] = [
    (
        {"experts_TK": torch.zeros(2, 2).long()},
        InvalidInput,
        "experts.shape: expected [3, K], one row per row of hidden, got [2, 2].",
    ),
    ({"experts_TK": torch.zeros(3).long()}, InvalidInput, "experts.shape: "),
    (
        {"experts_TK": torch.zeros(3, 0).long()},
        InvalidInput,
        "experts.shape: expected 1 to 16 experts per token, got 0.",
    ),
    (
        {"experts_TK": torch.zeros(3, 17).long()},
        InvalidInput,
        "experts.shape: expected 1 to 16 experts per token, got 17.",
    ),
    (
        {"experts_TK": torch.zeros(3, 2)},
        InvalidInput,
        "experts.dtype: expected int64 or int32, got float32.",
    ),
    (
        {"weights_TK": torch.ones(3, 1)},
        InvalidInput,
        "weights.shape: expected [3, 2], the shape of experts, got [3, 1].",
    ),
    (
        {"weights_TK": torch.ones(3, 2).int()},
        InvalidInput,
        "weights.dtype: expected a floating-point dtype, got int32.",
    ),
    (
        {"experts_TK": torch.tensor([[0, 1], [8, 0], [0, 1]])},
        UnknownExpert,
        "layer 1, expert 8: ids of this layer are 0 to 7",
    ),
    (
        {"experts_TK": torch.tensor([[0, 1], [2, -1], [0, 7]])},
        UnknownExpert,
        "layer 1, expert -1: ids of this layer are 0 to 7",
    ),
]


@pytest.mark.parametrize(("changes", "kind", "message"), WRONG_HIDDEN + WRONG_ROUTING)
def test_what_is_wrong_is_named(
    changes: dict[str, Any], kind: type[ExpertMeshError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        check_routing(**call(**changes))
    assert type(caught.value) is kind
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(("changes", "kind", "message"), WRONG_HIDDEN)
def test_hidden_states_alone_are_checked_alike(
    changes: dict[str, Any], kind: type[ExpertMeshError], message: str
) -> None:
    args = {name: call(**changes)[name] for name in ("layer", "hidden_TD", "num_experts")}
    with pytest.raises(kind) as caught:
        check_hidden(**args)
    assert caught.value.message.startswith(message)


def test_an_unknown_expert_tells_programs_which() -> None:
    with pytest.raises(UnknownExpert) as caught:
        check_routing(**call(experts_TK=torch.full((3, 2), 9)))
    assert caught.value.fields == {"layer": "1", "expert": "9"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_row_that_is_not_finite_is_named(value: float, dtype: torch.dtype) -> None:
    hidden_TD = torch.zeros(4, 3, dtype=dtype)
    check_finite(hidden_TD, "hidden")
    hidden_TD[2, 1] = hidden_TD[3, 0] = value
    with pytest.raises(NonFiniteInput, match="hidden: row 2 holds NaN or infinity") as caught:
        check_finite(hidden_TD, "hidden")
    assert caught.value.fields == {"field": "hidden", "row": "2"}
