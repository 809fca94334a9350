"""Checks of a ComputeRequest before its rows are queued: every wrong field has its typed error.

X experts of the request, R rows, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from expertmesh.experts.batch import PackedRows
from expertmesh.runtime.errors import InvalidInput, NonFiniteInput, UnknownExpert, UnknownModel
from expertmesh.runtime.tensors import bytes_of, dtype_name, from_bytes, torch_dtype
from expertmesh.v1 import expert_pb2

_FEW_ROWS = 8
ToRows = Callable[[memoryview, torch.dtype, tuple[int, int], str], torch.Tensor]


@dataclass(frozen=True)
class Holding:
    """What a replica serves: the facts a request is checked against."""

    model: str
    experts_by_layer: dict[int, frozenset[int]]
    dtype: torch.dtype
    hidden_size: int
    reject_nonfinite: bool


def admit(
    request: expert_pb2.ComputeRequest,
    payload: memoryview,
    holding: Holding,
    to_rows: ToRows = from_bytes,
) -> PackedRows:
    """The request's rows, or the error that says what is wrong with it.

    Args:
        to_rows: makes the payload a tensor, as `from_bytes` does.

    Raises:
        UnknownModel, UnknownExpert: not served or not held here.
        InvalidInput: wrong dtype, width, counts or length.
        NonFiniteInput: NaN or infinity while `reject_nonfinite` is on.
    """
    if request.model not in ("", holding.model):
        raise UnknownModel(f"model {request.model!r}: this replica serves {holding.model!r}")
    experts, counts = tuple(request.experts), tuple(request.rows_per_expert)
    _check_experts(request.layer, experts, holding)
    _check_counts(experts, counts)
    _check_form(request, holding)
    shape = (sum(counts), holding.hidden_size)
    rows_RD = to_rows(payload, holding.dtype, shape, "rows")
    if holding.reject_nonfinite and not bool(torch.isfinite(rows_RD).all()):
        row = int((~torch.isfinite(rows_RD)).any(-1).nonzero()[0])
        raise NonFiniteInput(f"rows: row {row} of {shape[0]} holds NaN or infinity", row=row)
    return PackedRows(request.layer, experts, counts, rows_RD)


class RowMemory:
    """Memory for the rows of the request that is being computed, used again for the next one.

    Without it a row costs three tensor operations before the first product: over the message, of
    the right shape, and at an address that products like.
    """

    def __init__(self) -> None:
        self._memory: dict[
            tuple[torch.dtype, tuple[int, int]], tuple[torch.Tensor, memoryview]
        ] = {}

    def rows(
        self, payload: memoryview, dtype: torch.dtype, shape: tuple[int, int], field: str
    ) -> torch.Tensor:
        """As `from_bytes`; valid until the next call."""
        if shape[0] > _FEW_ROWS:
            return from_bytes(payload, dtype, shape, field)
        own = self._memory.get((dtype, shape))
        if own is None:
            rows_RD = torch.empty(shape, dtype=dtype)
            own = self._memory[dtype, shape] = rows_RD, bytes_of(rows_RD)
        rows_RD, memory = own
        if len(payload) != len(memory):
            return from_bytes(payload, dtype, shape, field)  # raises what is wrong
        memory[:] = payload
        return rows_RD


def _check_experts(layer: int, experts: tuple[int, ...], holding: Holding) -> None:
    held = holding.experts_by_layer.get(layer)
    if held is None:
        layers = sorted(holding.experts_by_layer)
        raise UnknownExpert(f"layer {layer}: this replica has layers {layers}", layer=layer)
    for expert in experts:
        if expert not in held:
            message = f"layer {layer}, expert {expert}: this replica holds {sorted(held)}"
            raise UnknownExpert(message, layer=layer, expert=expert)


def _check_counts(experts: tuple[int, ...], counts: tuple[int, ...]) -> None:
    if len(experts) != len(counts) or not experts:
        got = f"{len(counts)} counts for {len(experts)} experts"
        raise InvalidInput.of("rows_per_expert", expected="one count per expert", got=got)
    if any(a >= b for a, b in pairwise(experts)):
        raise InvalidInput.of("experts", expected="ascending, distinct ids", got=list(experts))
    if min(counts) < 1:
        raise InvalidInput.of("rows_per_expert", expected="at least 1 each", got=list(counts))


def _check_form(request: expert_pb2.ComputeRequest, holding: Holding) -> None:
    dtype = torch_dtype(request.dtype)
    if dtype != holding.dtype:
        expected = f"{dtype_name(holding.dtype)}, the replica's"
        raise InvalidInput.of("dtype", expected=expected, got=dtype_name(dtype))
    if request.hidden_size != holding.hidden_size:
        expected = f"{holding.hidden_size}, the model's"
        raise InvalidInput.of("hidden_size", expected=expected, got=request.hidden_size)
