"""The rows of one call, on their way out and back: bytes between two tensors.

T tokens, D hidden size, K experts per token, S slots (T * K), R rows of a shipment.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from expertmesh.router.plan import Shipment
from expertmesh.runtime.tensors import bytes_of, to_bytes

_FEW_SLOTS = 64
"""Up to here a slice of memory per row is cheaper than torch's operations on all of them."""


class CallRows(Protocol):
    """Cuts a call's hidden states into shipments and puts the outputs where they belong."""

    def take(self, index: int) -> Sequence[memoryview]:
        """The bytes of the rows of a shipment, in its order. They must not be changed."""
        ...

    def put(self, index: int, payload: memoryview) -> None:
        """File a shipment's outputs, in its order; as many bytes as its rows have."""
        ...

    def finish(self, filed: Sequence[int]) -> None:
        """No more will come.

        Args:
            filed: indices of the shipments that were put.
        """
        ...


def call_rows(
    hidden_TD: torch.Tensor, top_k: int, shipments: Sequence[Shipment], outputs_SD: torch.Tensor
) -> CallRows:
    """The rows that the shipments name; their outputs go to `outputs_SD`, a row per slot."""
    rows = _FewRows if outputs_SD.shape[0] <= _FEW_SLOTS else _ManyRows
    return rows(hidden_TD, top_k, shipments, outputs_SD)


class _FewRows:
    """Row by row, without a tensor operation."""

    def __init__(
        self,
        hidden_TD: torch.Tensor,
        top_k: int,
        shipments: Sequence[Shipment],
        outputs_SD: torch.Tensor,
    ) -> None:
        self._top_k = top_k
        self._shipments = shipments
        self._row_bytes = hidden_TD.shape[1] * hidden_TD.itemsize
        self._hidden, self._outputs = to_bytes(hidden_TD), bytes_of(outputs_SD)

    def take(self, index: int) -> Sequence[memoryview]:
        """See `CallRows.take`."""
        size, hidden = self._row_bytes, self._hidden
        starts = [slot // self._top_k * size for slot in self._shipments[index].slots_R]
        return [hidden[start : start + size] for start in starts]

    def put(self, index: int, payload: memoryview) -> None:
        """See `CallRows.put`."""
        size, start = self._row_bytes, 0
        for slot in self._shipments[index].slots_R:
            self._outputs[slot * size : (slot + 1) * size] = payload[start : start + size]
            start += size

    def finish(self, filed: Sequence[int]) -> None:
        """See `CallRows.finish`."""


class _ManyRows:
    """One gather and one scatter for the whole call, whatever the number of replicas."""

    def __init__(
        self,
        hidden_TD: torch.Tensor,
        top_k: int,
        shipments: Sequence[Shipment],
        outputs_SD: torch.Tensor,
    ) -> None:
        self._slots_S = torch.tensor([slot for shipment in shipments for slot in shipment.slots_R])
        self._outputs_SD = outputs_SD
        tokens_S = self._slots_S.div(top_k, rounding_mode="floor")
        self._rows_SD = hidden_TD.index_select(0, tokens_S)
        self._done_SD = torch.empty_like(self._rows_SD)
        self._rows, self._done = to_bytes(self._rows_SD), bytes_of(self._done_SD)
        self._row_bytes = hidden_TD.shape[1] * hidden_TD.itemsize
        self._bounds = [0]
        for shipment in shipments:
            self._bounds.append(self._bounds[-1] + len(shipment.slots_R))

    def take(self, index: int) -> Sequence[memoryview]:
        """See `CallRows.take`."""
        return [self._rows[self._bytes(index)]]

    def put(self, index: int, payload: memoryview) -> None:
        """See `CallRows.put`."""
        self._done[self._bytes(index)] = payload

    def _bytes(self, index: int) -> slice:
        first, last = self._bounds[index], self._bounds[index + 1]
        return slice(first * self._row_bytes, last * self._row_bytes)

    def finish(self, filed: Sequence[int]) -> None:
        """See `CallRows.finish`."""
        if len(filed) == len(self._bounds) - 1:
            self._outputs_SD.index_copy_(0, self._slots_S, self._done_SD)
            return
        for index in filed:  # others have answered in place of the rest
            rows = slice(self._bounds[index], self._bounds[index + 1])
            self._outputs_SD.index_copy_(0, self._slots_S[rows], self._done_SD[rows])
