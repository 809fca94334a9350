"""A request is checked before it is queued: one typed error for each thing that can be wrong."""

from typing import Any

import pytest
import torch

from expertmesh.experts.admission import Holding, RowMemory, admit
from expertmesh.experts.batch import PackedRows
from expertmesh.runtime.errors import (
    ExpertMeshError,
    InvalidInput,
    NonFiniteInput,
    UnknownExpert,
    UnknownModel,
)
from expertmesh.runtime.tensors import bytes_of, to_bytes
from expertmesh.v1 import expert_pb2, tensor_pb2

HOLDING = Holding(
    model="demo",
    experts_by_layer={1: frozenset({0, 2, 5}), 3: frozenset({0})},
    dtype=torch.float32,
    hidden_size=4,
    reject_nonfinite=True,
)
ROWS_RD = torch.arange(12, dtype=torch.float32).view(3, 4)


def ask(rows_RD: torch.Tensor = ROWS_RD, holding: Holding = HOLDING, **changes: Any) -> PackedRows:
    """What `admit` makes of a good request with `changes`."""
    fields: dict[str, Any] = {
        "model": "demo",
        "layer": 1,
        "experts": [0, 5],
        "rows_per_expert": [2, 1],
        "dtype": tensor_pb2.DTYPE_FLOAT32,
        "hidden_size": 4,
    }
    request = expert_pb2.ComputeRequest(**(fields | changes))
    return admit(request, to_bytes(rows_RD), holding)


@pytest.mark.parametrize("model", ["demo", ""])
def test_a_good_request(model: str) -> None:
    rows = ask(model=model)
    assert (rows.layer, rows.experts, rows.rows_per_expert) == (1, (0, 5), (2, 1))
    assert torch.equal(rows.rows_RD, ROWS_RD)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": "other"}, UnknownModel, "model 'other': this replica serves 'demo'"),
        ({"layer": 2}, UnknownExpert, "layer 2: this replica has layers [1, 3]"),
        (
            {"experts": [0, 4]},
            UnknownExpert,
            "layer 1, expert 4: this replica holds [0, 2, 5]",
        ),
        (
            {"experts": [], "rows_per_expert": []},
            InvalidInput,
            "rows_per_expert: expected one count per expert, got 0 counts for 0 experts.",
        ),
        (
            {"rows_per_expert": [3]},
            InvalidInput,
            "rows_per_expert: expected one count per expert, got 1 counts for 2 experts.",
        ),
        (
            {"experts": [5, 0]},
            InvalidInput,
            "experts: expected ascending, distinct ids, got [5, 0].",
        ),
        (
            {"experts": [5, 5]},
            InvalidInput,
            "experts: expected ascending, distinct ids, got [5, 5].",
        ),
        (
            {"rows_per_expert": [3, 0]},
            InvalidInput,
            "rows_per_expert: expected at least 1 each, got [3, 0].",
        ),
        (
            {"dtype": tensor_pb2.DTYPE_BFLOAT16},
            InvalidInput,
            "dtype: expected float32, the replica's, got bfloat16.",
        ),
        ({"dtype": 0}, InvalidInput, "dtype: expected one of "),
        ({"hidden_size": 5}, InvalidInput, "hidden_size: expected 4, the model's, got 5."),
        (
            {"rows_per_expert": [2, 2]},
            InvalidInput,
            "rows: expected 64 bytes for float32[4, 4], got 48 bytes.",
        ),
        (
            {"rows_per_expert": [2**32 - 1, 2**32 - 1]},
            InvalidInput,
            "rows: expected 137438953440 bytes",
        ),
    ],
)
def test_what_is_wrong_is_named(
    changes: dict[str, Any], kind: type[ExpertMeshError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        ask(**changes)
    assert type(caught.value) is kind
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_refused_if_wanted(value: float) -> None:
    rows_RD = ROWS_RD.clone()
    rows_RD[1, 3] = value
    with pytest.raises(NonFiniteInput, match="rows: row 1 of 3 holds NaN or infinity"):
        ask(rows_RD)
    tolerant = Holding(**(vars(HOLDING) | {"reject_nonfinite": False}))
    admitted = ask(rows_RD, tolerant).rows_RD
    assert torch.equal(admitted.isfinite(), rows_RD.isfinite())


def test_an_unknown_expert_tells_programs_which() -> None:
    with pytest.raises(UnknownExpert) as caught:
        ask(layer=3, experts=[0, 2])
    assert caught.value.fields == {"layer": "3", "expert": "2"}


def test_few_rows_share_memory_and_many_do_not() -> None:
    memory = RowMemory()
    for num_rows in (1, 3, 1, 9, 3):
        rows_RD = torch.randn(num_rows, 4)
        payload = memoryview(bytes(bytes_of(rows_RD)))
        own_RD = memory.rows(payload, torch.float32, (num_rows, 4), "rows")
        assert torch.equal(own_RD, rows_RD)
        if num_rows <= 8:
            again_RD = memory.rows(payload, torch.float32, (num_rows, 4), "rows")
            assert again_RD.data_ptr() == own_RD.data_ptr()
            assert own_RD.data_ptr() % 64 == 0, "as products like it"
    with pytest.raises(InvalidInput, match="rows: expected 16 bytes for float32"):
        memory.rows(memoryview(b"short"), torch.float32, (1, 4), "rows")
