"""Merging rows of several callers into one batch of a layer, and splitting the outputs again.

R rows, D hidden size, X experts of one request. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


class PackedRows(NamedTuple):
    """Rows for some experts of one layer, sorted by expert."""

    layer: int
    experts: tuple[int, ...]
    """Expert ids, ascending and distinct (X)."""
    rows_per_expert: tuple[int, ...]
    """Rows of each (X), at least 1."""
    rows_RD: torch.Tensor

    @property
    def num_rows(self) -> int:
        """R."""
        return self.rows_RD.shape[0]


class Computed(NamedTuple):
    """One request's answer."""

    rows_RD: torch.Tensor
    queue_s: float
    """From admission to the start of compute."""
    compute_s: float
    """Of the batch the request was computed in."""
    batch_rows: int


@dataclass(frozen=True)
class MergedBatch:
    """Several requests' rows as one, and where each piece came from."""

    rows: PackedRows
    pieces: tuple[tuple[int, int], ...]
    """(request, number of rows) of each contiguous piece, in the batch's row order."""


def experts_of(requests: Sequence[PackedRows]) -> tuple[int, ...]:
    """The experts of requests of one layer, ascending."""
    return tuple(sorted(set().union(*(rows.experts for rows in requests))))


def merge(requests: Sequence[PackedRows]) -> MergedBatch:
    """One batch of all requests' rows, sorted by expert, within an expert in the order given.

    A single request passes through without a copy, so a lone caller's GEMMs have the shapes that
    transformers' own would have. All requests are of the same layer.
    """
    if len(requests) == 1:
        return MergedBatch(requests[0], ((0, requests[0].num_rows),))
    sliced = [
        dict(zip(r.experts, torch.split(r.rows_RD, list(r.rows_per_expert)), strict=True))
        for r in requests
    ]
    experts = experts_of(requests)
    pieces, counts, parts = [], [], []
    for expert in experts:
        owned = [(index, rows[expert]) for index, rows in enumerate(sliced) if expert in rows]
        pieces += [(index, part.shape[0]) for index, part in owned]
        counts.append(sum(part.shape[0] for _, part in owned))
        parts += [part for _, part in owned]
    merged = PackedRows(requests[0].layer, experts, tuple(counts), torch.cat(parts))
    return MergedBatch(merged, tuple(pieces))


def split(batch: MergedBatch, outputs_RD: torch.Tensor, num_requests: int) -> list[torch.Tensor]:
    """Each request's outputs, in the order of its own rows."""
    if num_requests == 1:
        return [outputs_RD]
    parts: list[list[torch.Tensor]] = [[] for _ in range(num_requests)]
    sizes = [num_rows for _, num_rows in batch.pieces]
    for (request, _), part in zip(batch.pieces, torch.split(outputs_RD, sizes), strict=True):
        parts[request].append(part)
    return [torch.cat(own) for own in parts]
