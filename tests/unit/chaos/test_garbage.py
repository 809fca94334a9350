"""Garbage is garbage: every kind changes what it should, and the others leave it alone."""

from random import Random

import pytest
from chaos.garbage import KINDS, WRONG_BYTES, WRONG_PROGRAMS, Garbler

from expertmesh.runtime import wire
from expertmesh.runtime.errors import ExpertMeshError
from expertmesh.v1 import expert_pb2, tensor_pb2

ROWS = memoryview(bytes(range(256)) * 8)


def answer() -> expert_pb2.ComputeResponse:
    return expert_pb2.ComputeResponse(id=7, dtype=tensor_pb2.DTYPE_BFLOAT16, hidden_size=128)


@pytest.mark.parametrize("kind", WRONG_BYTES)
def test_bytes_changed_after_the_checksum_are_noticed(kind: str) -> None:
    garbler = Garbler(kind, 1.0, random=Random(1))
    for _ in range(200):
        header, rows = garbler.reply(answer(), ROWS)
        assert (header, rows) == (answer(), ROWS)
        data = wire.encode(header, rows)
        spoiled = garbler.message(data)
        assert spoiled != data
        with pytest.raises(ExpertMeshError):
            wire.decode(expert_pb2.ComputeResponse, spoiled, needs_checksum=True)


@pytest.mark.parametrize("kind", WRONG_PROGRAMS)
def test_a_wrong_program_sends_a_valid_message_that_says_something_else(kind: str) -> None:
    garbler = Garbler(kind, 1.0)
    header, rows = garbler.reply(answer(), ROWS)
    assert (header, rows) != (answer(), ROWS)
    data = wire.encode(header, rows)
    assert garbler.message(data) == data
    got, payload = wire.decode(expert_pb2.ComputeResponse, data, needs_checksum=True)
    got.ClearField("checksum")
    assert (got, payload) == (header, rows)


def test_a_share_of_the_answers_is_garbled_and_counted() -> None:
    told: list[None] = []
    garbler = Garbler("missing_rows", 0.25, lambda: told.append(None))
    whole = sum(garbler.reply(answer(), ROWS)[1] == ROWS for _ in range(1000))
    assert 650 < whole < 850
    assert len(told) == 1000 - whole


def test_every_kind_has_a_name_of_its_own() -> None:
    assert len(set(KINDS)) == len(WRONG_BYTES) + len(WRONG_PROGRAMS)
