"""Rows leave as the plan says and their outputs come back to their slots, few or many."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.router import rows as rows_module
from expertmesh.router.plan import Shipment
from expertmesh.router.rows import call_rows
from expertmesh.runtime.tensors import bytes_of

DTYPES = [torch.float32, torch.bfloat16]


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 64, 1000]),
    st.randoms(use_true_random=False),
)
def test_every_output_is_filed_in_its_slot(
    num_tokens: int, top_k: int, groups: int, dtype: torch.dtype, few: int, random: object
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "_FEW_SLOTS", few)
        hidden_TD = torch.randn(num_tokens, 6).to(dtype)
        slots = list(range(num_tokens * top_k))
        random.shuffle(slots)  # type: ignore[attr-defined]
        cuts = [slots[number::groups] for number in range(groups)]
        shipments = [Shipment(f"r{n}", [n], [len(cut)], cut) for n, cut in enumerate(cuts) if cut]
        outputs_SD = torch.full((len(slots), 6), torch.nan, dtype=dtype)
        rows = call_rows(hidden_TD, top_k, shipments, outputs_SD)
        for index, shipment in enumerate(shipments):
            payload = bytearray(b"".join(rows.take(index)))
            sent_RD = torch.frombuffer(payload, dtype=dtype).view(-1, 6)
            assert torch.equal(sent_RD, hidden_TD[[slot // top_k for slot in shipment.slots_R]])
            back_RD = sent_RD + torch.tensor(shipment.slots_R).unsqueeze(1).to(dtype)
            rows.put(index, bytes_of(back_RD))
        rows.finish(range(len(shipments)))
        slot_S = torch.arange(len(slots))
        assert torch.equal(outputs_SD, hidden_TD[slot_S // top_k] + slot_S.unsqueeze(1).to(dtype))


@pytest.mark.parametrize("num_tokens", [3, 300])
def test_rows_that_did_not_come_are_left_alone(num_tokens: int) -> None:
    hidden_TD = torch.randn(num_tokens, 6)
    slots = list(range(num_tokens))
    shipments = [
        Shipment("a", [0], [2], slots[:2]),
        Shipment("b", [1], [len(slots) - 2], slots[2:]),
    ]
    outputs_SD = torch.full((num_tokens, 6), 7.0)
    rows = call_rows(hidden_TD, 1, shipments, outputs_SD)
    rows.put(0, b"".join(rows.take(0)))  # type: ignore[arg-type]
    rows.finish([0])
    assert torch.equal(outputs_SD[:2], hidden_TD[:2])
    assert bool((outputs_SD[2:] == 7).all())
