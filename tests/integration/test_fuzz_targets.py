"""The targets of `make fuzz` over mutations of well-formed inputs, a few hundred each; and bombs:
what a small message must not cost.
"""

import resource
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz.seeds import seeds
from tests.fuzz.servicers import servicer_targets
from tests.fuzz.targets import Loop, Target, pure_targets

from expertmesh.runtime import wire
from expertmesh.runtime.errors import InvalidInput, MalformedMessage
from expertmesh.runtime.state.record import MAX_RECORD_BYTES, parse_record
from expertmesh.runtime.tensors import from_proto
from expertmesh.v1 import control_pb2, expert_pb2, generate_pb2, router_pb2, tensor_pb2

SEEDS = seeds()
NAMES = sorted(SEEDS)
Edit = tuple[int, int, bytes]
"""Position, bytes removed there, bytes put in their place."""


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[str, Target]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "_SMALL_BYTES", 0)
        patch.setattr(wire, "_UNSCANNED_BYTES", 0)
        loop = Loop()
        yield pure_targets(loop) | servicer_targets(loop)
        loop.close()


def edited(data: bytes, edits: list[Edit]) -> bytes:
    """The data with all edits."""
    for at, num_removed, added in edits:
        at %= len(data) + 1
        data = data[:at] + added + data[at + num_removed :]
    return data


EDITS = st.lists(
    st.tuples(st.integers(0, 4096), st.integers(0, 8), st.binary(max_size=8)), max_size=6
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(index=st.integers(0, 7), edits=EDITS)
def test_mutated_input(
    targets: dict[str, Target], name: str, index: int, edits: list[Edit]
) -> None:
    own = SEEDS[name]
    targets[name](edited(own[index % len(own)], edits))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200))
def test_any_bytes(targets: dict[str, Target], name: str, data: bytes) -> None:
    targets[name](data)


SMALL_FIELDS = b"\x08\x01"  # field 1: 1
EMPTY_STOP = b"\x32\x00"  # GenerateRequest.stop: ""
FLOAT32 = tensor_pb2.DTYPE_FLOAT32
BOMB_BYTES = 32 << 20
MAX_CPU_S = 1.0
MAX_GROWTH_MIB = 128


class Cost:
    """Of a block, in CPU time and memory."""

    def __enter__(self) -> "Cost":
        self._began_s, self._began_mib = time.process_time(), self._peak_mib()
        return self

    def __exit__(self, *raised: object) -> None:
        self.cpu_s = time.process_time() - self._began_s
        self.growth_mib = self._peak_mib() - self._began_mib

    @staticmethod
    def _peak_mib() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


@pytest.mark.parametrize(
    ("message_type", "unit"),
    [
        (generate_pb2.GenerateRequest, EMPTY_STOP),
        (router_pb2.DispatchRequest, SMALL_FIELDS),
        (router_pb2.ForwardRequest, b"\x2a\x00"),  # selection: {}
        (expert_pb2.ComputeRequest, SMALL_FIELDS),
        (expert_pb2.ComputeRequest, b"\x20\x01"),  # experts: 1, not packed
    ],
)
def test_millions_of_fields_are_refused_at_once(message_type: type, unit: bytes) -> None:
    data = unit * (BOMB_BYTES // len(unit))
    is_framed = message_type is expert_pb2.ComputeRequest
    decode = wire.decode if is_framed else wire.decode_whole
    with Cost() as cost, pytest.raises(MalformedMessage, match="more than 65536 fields"):
        decode(message_type, data)
    assert cost.cpu_s < MAX_CPU_S
    assert cost.growth_mib < MAX_GROWTH_MIB


def packed(tag: bytes, num_bytes: int) -> bytes:
    """A field of many small numbers."""
    return tag + wire._varint(num_bytes) + b"\x01" * num_bytes


def test_millions_of_numbers_are_refused_at_once() -> None:
    shape = packed(b"\x12", BOMB_BYTES)  # Tensor.shape
    request = b"\x1a" + wire._varint(len(shape)) + shape  # DispatchRequest.hidden
    with Cost() as cost, pytest.raises(MalformedMessage, match="besides its payload"):
        wire.decode_whole(router_pb2.DispatchRequest, request)
    with cost, pytest.raises(MalformedMessage, match="besides its payload"):
        wire.decode(expert_pb2.ComputeRequest, packed(b"\x22", BOMB_BYTES))
    assert cost.cpu_s < MAX_CPU_S
    assert cost.growth_mib < MAX_GROWTH_MIB


def test_a_shape_of_a_million_sizes_is_refused_at_once() -> None:
    """Their product would have millions of digits."""
    message = tensor_pb2.Tensor(dtype=FLOAT32, shape=[2**32 - 1] * 1_000_000)
    with Cost() as cost, pytest.raises(InvalidInput, match="at most 8 sizes, got 1000000"):
        from_proto(message, "hidden")
    assert cost.cpu_s < MAX_CPU_S


def test_a_record_of_many_layers_is_refused_at_once() -> None:
    state = control_pb2.ReplicaState(holds=[control_pb2.LayerExperts()] * (MAX_RECORD_BYTES // 3))
    with Cost() as cost, pytest.raises(MalformedMessage):
        parse_record(state.SerializeToString())
    assert cost.cpu_s < MAX_CPU_S
    assert cost.growth_mib < MAX_GROWTH_MIB


def test_large_payloads_are_not_bombs() -> None:
    data = bytes(8 << 20)
    request = router_pb2.ForwardRequest(
        hidden=tensor_pb2.Tensor(dtype=FLOAT32, shape=[1], data=data)
    )
    encoded = request.SerializeToString()
    assert wire.decode_whole(router_pb2.ForwardRequest, encoded) == request
    text = generate_pb2.GenerateRequest(text="x" * (3 << 20))
    assert wire.decode_whole(generate_pb2.GenerateRequest, text.SerializeToString()) == text
    ids = generate_pb2.GenerateRequest(tokens=generate_pb2.TokenIds(ids=[70_000] * 1_000_000))
    assert wire.decode_whole(generate_pb2.GenerateRequest, ids.SerializeToString()) == ids
