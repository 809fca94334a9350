"""Framing large payloads: exactly protobuf's bytes, and nothing but MalformedMessage for others."""

from array import array

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expertmesh.runtime import wire
from expertmesh.runtime.errors import MalformedMessage
from expertmesh.v1 import expert_pb2, tensor_pb2

Request = expert_pb2.ComputeRequest
UINT32 = st.integers(0, 2**32 - 1)
HEADERS = st.builds(
    Request,
    id=st.integers(0, 2**64 - 1),
    model=st.text(max_size=20),
    layer=UINT32,
    experts=st.lists(UINT32, max_size=20),
    rows_per_expert=st.lists(UINT32, max_size=20),
    dtype=st.sampled_from([0, 1, 3, 77]),
    hidden_size=UINT32,
    timeout_ms=UINT32,
    traceparent=st.text(max_size=20),
)
PAYLOADS = st.binary(max_size=400)
LATER_FIELD = b"\x18\x07"  # layer: 7
PAYLOAD_TAG = b"\x7a"  # field 15, length-delimited


def with_rows(header: Request, payload: bytes) -> Request:
    """What stock protobuf holds for this header and payload."""
    whole = Request()
    whole.CopyFrom(header)
    whole.rows = payload
    return whole


@settings(deadline=None)
@given(HEADERS, PAYLOADS)
@example(Request(), b"")
@example(Request(id=1), bytes(1 << 16))
def test_header_and_payload_come_back(header: Request, payload: bytes) -> None:
    decoded, view = wire.decode(Request, wire.encode(header, payload))
    assert decoded == header
    assert view == payload


@settings(deadline=None)
@given(HEADERS, PAYLOADS)
def test_stock_protobuf_reads_what_encode_writes(header: Request, payload: bytes) -> None:
    assert Request.FromString(wire.encode(header, payload)) == with_rows(header, payload)


@settings(deadline=None)
@given(HEADERS, PAYLOADS)
def test_decode_reads_what_stock_protobuf_writes(header: Request, payload: bytes) -> None:
    decoded, view = wire.decode(Request, with_rows(header, payload).SerializeToString())
    assert (decoded, bytes(view)) == (header, payload)


@settings(deadline=None)
@given(HEADERS, PAYLOADS, HEADERS)
@example(Request(id=3), b"", Request(layer=7))
def test_fields_behind_the_payload_are_not_lost(
    header: Request, payload: bytes, more: Request
) -> None:
    data = wire.encode(header, payload) + more.SerializeToString()
    whole = Request.FromString(data)
    decoded, view = wire.decode(Request, data)
    assert bytes(view) == payload
    assert with_rows(decoded, payload) == whole


def test_the_header_never_keeps_the_payload() -> None:
    decoded, view = wire.decode(Request, wire.encode(Request(id=3), b"rows") + LATER_FIELD)
    assert decoded == Request(id=3, layer=7)
    assert bytes(view) == b"rows"


@pytest.mark.parametrize(("first", "last"), [(b"old", b"new"), (b"old", b"")])
def test_of_two_payloads_the_last_counts_as_in_protobuf(first: bytes, last: bytes) -> None:
    data = wire.encode(Request(id=3), first) + wire.encode(Request(layer=7), last)
    decoded, view = wire.decode(Request, data)
    assert (decoded, bytes(view)) == (Request(id=3, layer=7), last)


def test_the_payload_is_a_view_of_the_message() -> None:
    data = wire.encode(Request(id=1), b"x" * 1000)
    assert wire.decode(Request, data)[1].obj is data


@pytest.mark.parametrize(
    "payload", [bytearray(b"abcdefgh"), memoryview(b"abcdefgh"), memoryview(array("d", [1.5]))]
)
def test_any_contiguous_buffer_is_a_payload(payload: wire.Buffer) -> None:
    assert wire.decode(Request, wire.encode(Request(), payload))[1] == bytes(payload)


def test_every_message_with_field_15_bytes_can_be_framed() -> None:
    header = tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_INT32, shape=[1])
    assert wire.decode(tensor_pb2.Tensor, wire.encode(header, b"\1\0\0\0")) == (
        header,
        memoryview(b"\1\0\0\0"),
    )


def check_like_stock(data: bytes) -> None:
    """Refused, or exactly what stock protobuf makes of it; any other exception is a failure."""
    try:
        decoded, view = wire.decode(Request, data)
    except MalformedMessage:
        return
    assert with_rows(decoded, bytes(view)) == Request.FromString(data)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60))
@example(PAYLOAD_TAG + b"\x00" + LATER_FIELD)
@example(PAYLOAD_TAG + b"\x00")
@example(b"\x78\x05")  # field 15, but a varint
@example(b"\x0a\x01\xff")
@example(b"\x12\x01\xff")  # model: not UTF-8
def test_garbage_is_refused_or_read_as_protobuf_reads_it(data: bytes) -> None:
    check_like_stock(data)


@settings(deadline=None)
@given(HEADERS, st.binary(min_size=1, max_size=40), st.data())
def test_a_cut_message_is_refused_or_read_as_protobuf_reads_it(
    header: Request, payload: bytes, data: st.DataObject
) -> None:
    whole = wire.encode(header, payload)
    cut = data.draw(st.integers(0, len(whole) - 1))
    check_like_stock(whole[:cut])
    if cut >= len(whole) - len(payload):
        with pytest.raises(MalformedMessage, match="cut short"):
            wire.decode(Request, whole[:cut])


@settings(deadline=None)
@given(HEADERS, PAYLOADS, st.data())
def test_a_flipped_byte_is_refused_or_read_as_protobuf_reads_it(
    header: Request, payload: bytes, data: st.DataObject
) -> None:
    whole = bytearray(wire.encode(header, payload))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    check_like_stock(bytes(whole))


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 11,  # a tag without end
        b"\xff" * 1_000_000,
        b"\x08" + b"\x80" * 11 + b"\x01",  # id
        PAYLOAD_TAG + b"\xff" * 11 + b"\x01",  # the payload's length
    ],
)
def test_a_varint_above_ten_bytes_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage, match="varint of more than 10 bytes"):
        wire.decode(Request, data)


@pytest.mark.parametrize(
    "data",
    [
        PAYLOAD_TAG + b"\xff" * 8 + b"\x7f" + b"x",  # 2 ** 63 - 1 bytes to come
        b"\x12\xff\xff\xff\xff\x0f",  # a model name of 4 GiB
        PAYLOAD_TAG,  # a tag and nothing
        PAYLOAD_TAG + b"\x80",  # half a length
        b"\x09\x00",  # eight bytes to come
        b"\x0d\x00",  # four bytes to come
        b"\x00\x01",  # field 0
        b"\x12\x02\xc3\x28",  # model: not UTF-8
    ],
)
def test_a_message_that_promises_more_than_it_holds_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        Request.FromString(data)
    with pytest.raises(
        MalformedMessage, match=f"{len(data)} bytes are not a expertmesh.v1.ComputeRequest"
    ):
        wire.decode(Request, data)


@pytest.mark.parametrize("wire_type", [3, 4, 6, 7])
def test_a_wire_type_proto3_does_not_have_is_refused(wire_type: int) -> None:
    with pytest.raises(MalformedMessage, match=f"wire type {wire_type} at byte 2"):
        wire.decode(Request, LATER_FIELD + bytes([2 << 3 | wire_type]))


def test_fixed_width_fields_of_a_newer_peer_are_skipped() -> None:
    unknown = b"\xa1\x01" + bytes(8) + b"\xad\x01" + bytes(4)  # fields 20 and 21
    decoded, view = wire.decode(Request, unknown + wire.encode(Request(id=9), b"rows"))
    assert decoded.id == 9
    assert bytes(view) == b"rows"
