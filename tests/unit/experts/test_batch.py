"""Merging callers' rows and splitting the outputs: every row goes back to where it came from."""

from collections import Counter

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expertmesh.experts.batch import PackedRows, merge, split

HIDDEN_SIZE = 2
# of each request: expert -> rows
COUNTS = st.dictionaries(st.integers(0, 6), st.integers(1, 4), min_size=1, max_size=5)


def packed(counts: dict[int, int], first_row: int) -> PackedRows:
    """Rows for these experts, each of its own value; the value's second half is the expert."""
    experts = sorted(counts)
    owners = [expert for expert in experts for _ in range(counts[expert])]
    rows_RD = torch.tensor(
        [[first_row + row, expert] for row, expert in enumerate(owners)], dtype=torch.float32
    )
    return PackedRows(3, tuple(experts), tuple(counts[e] for e in experts), rows_RD)


def requests_of(counts: list[dict[int, int]]) -> list[PackedRows]:
    """Requests without a common value."""
    return [packed(own, 1000 * index) for index, own in enumerate(counts)]


@settings(deadline=None)
@given(st.lists(COUNTS, min_size=1, max_size=6))
@example([{0: 1}, {0: 1}])
@example([{5: 2}, {0: 1, 5: 3}, {6: 1}])
def test_every_row_returns_to_its_request_in_order(counts: list[dict[int, int]]) -> None:
    requests = requests_of(counts)
    batch = merge(requests)
    outputs = split(batch, batch.rows.rows_RD * 2, len(requests))
    assert len(outputs) == len(requests)
    for request, output_RD in zip(requests, outputs, strict=True):
        assert torch.equal(output_RD, request.rows_RD * 2)


@settings(deadline=None)
@given(st.lists(COUNTS, min_size=1, max_size=6))
def test_the_batch_is_a_permutation_sorted_by_expert(counts: list[dict[int, int]]) -> None:
    requests = requests_of(counts)
    rows = merge(requests).rows
    total = sum((Counter(own) for own in counts), Counter())
    assert rows.layer == 3
    assert dict(zip(rows.experts, rows.rows_per_expert, strict=True)) == dict(total)
    assert list(rows.experts) == sorted(total)
    every_RD = torch.cat([request.rows_RD for request in requests])
    assert sorted(rows.rows_RD.tolist()) == sorted(every_RD.tolist())
    owners = [e for e, n in zip(rows.experts, rows.rows_per_expert, strict=True) for _ in range(n)]
    assert rows.rows_RD[:, 1].tolist() == owners, "each expert's rows lie together"


@settings(deadline=None)
@given(st.lists(COUNTS, min_size=1, max_size=6))
def test_an_experts_rows_stay_in_the_order_of_the_requests(counts: list[dict[int, int]]) -> None:
    rows = merge(requests_of(counts)).rows
    for part_RD in torch.split(rows.rows_RD, list(rows.rows_per_expert)):
        values = part_RD[:, 0].tolist()
        assert values == sorted(values)


def test_a_lone_request_passes_through_uncopied() -> None:
    request = packed({1: 2, 4: 1}, 0)
    batch = merge([request])
    assert batch.rows is request
    output_RD = torch.ones(3, HIDDEN_SIZE)
    assert split(batch, output_RD, 1)[0] is output_RD
