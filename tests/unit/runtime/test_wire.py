"""Framing large payloads: exactly protobuf's bytes, and nothing but MalformedMessage for others."""

from array import array
from collections.abc import Iterator

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from expertmesh.runtime import wire
from expertmesh.runtime.errors import MalformedMessage
from expertmesh.v1 import expert_pb2

Request = expert_pb2.ComputeRequest


@pytest.fixture(autouse=True, scope="module", params=[0, wire._SMALL_BYTES], ids=["large", "small"])
def small_bytes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every message is decoded as a large one, and as a small one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "_SMALL_BYTES", request.param)
        yield


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
    decoded, view = wire.decode(Request, wire.encode(header, payload), needs_checksum=True)
    decoded.ClearField("checksum")
    assert decoded == header
    assert view == payload


@settings(deadline=None)
@given(HEADERS, PAYLOADS)
def test_stock_protobuf_reads_what_encode_writes(header: Request, payload: bytes) -> None:
    read = Request.FromString(wire.encode(header, payload))
    assert read.checksum
    read.ClearField("checksum")
    assert read == with_rows(header, payload)


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
    data = with_rows(header, payload).SerializeToString() + more.SerializeToString()
    whole = Request.FromString(data)
    decoded, view = wire.decode(Request, data)
    assert bytes(view) == payload
    assert with_rows(decoded, payload) == whole


def test_the_header_never_keeps_the_payload() -> None:
    data = Request(id=3, rows=b"rows").SerializeToString() + LATER_FIELD
    decoded, view = wire.decode(Request, data)
    assert decoded == Request(id=3, layer=7)
    assert bytes(view) == b"rows"


@pytest.mark.parametrize(("first", "last"), [(b"old", b"new"), (b"old", b"")])
def test_of_two_payloads_the_last_counts_as_in_protobuf(first: bytes, last: bytes) -> None:
    data = with_rows(Request(id=3), first).SerializeToString() + b"\x18\x07"
    data += PAYLOAD_TAG + bytes([len(last)]) + last
    decoded, view = wire.decode(Request, data)
    assert (decoded, bytes(view)) == (Request(id=3, layer=7), last)


def test_the_payload_is_a_view_of_the_message() -> None:
    data = wire.encode(Request(id=1), b"x" * 100_000)
    assert wire.decode(Request, data)[1].obj is data


@pytest.mark.parametrize(
    "payload", [bytearray(b"abcdefgh"), memoryview(b"abcdefgh"), memoryview(array("d", [1.5]))]
)
def test_any_contiguous_buffer_is_a_payload(payload: wire.Buffer) -> None:
    assert wire.decode(Request, wire.encode(Request(), payload))[1] == bytes(payload)


@settings(deadline=None)
@given(HEADERS, st.binary(min_size=1, max_size=400), st.data())
def test_a_changed_byte_never_passes(header: Request, payload: bytes, data: st.DataObject) -> None:
    whole = bytearray(wire.encode(header, payload))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(MalformedMessage):
        wire.decode(Request, bytes(whole), needs_checksum=True)


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_message_without_a_checksum_is_refused_where_one_is_needed(size: int) -> None:
    data = Request(id=3, rows=b"x" * size).SerializeToString()
    assert wire.decode(Request, data)[0].id == 3
    with pytest.raises(MalformedMessage, match="has no checksum"):
        wire.decode(Request, data, needs_checksum=True)


def test_a_checksum_is_that_of_the_bytes_before_it_and_of_the_rows() -> None:
    """What docs/wire.md says, as a stock client would write it."""
    header, rows = Request(id=3, layer=7), b"rows"
    before = header.SerializeToString()
    header.checksum = xxh3_64_intdigest(rows, xxh3_64_intdigest(before))
    header.rows = rows
    assert wire.decode(Request, header.SerializeToString(), needs_checksum=True)[1] == rows
    assert wire.encode(Request(id=3, layer=7), rows) == header.SerializeToString()


def test_rows_in_parts_have_the_checksum_of_the_whole() -> None:
    parts = [memoryview(b"some"), memoryview(b""), memoryview(b"rows")]
    assert wire.encode_head(Request(id=3), *parts) == wire.encode_head(Request(id=3), b"somerows")


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
    with pytest.raises(MalformedMessage):
        wire.decode(Request, whole[:cut], needs_checksum=True)


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
    with pytest.raises(
        MalformedMessage, match=r"varint of more than 10 bytes|are not a expertmesh\.v1"
    ):
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
    with pytest.raises(
        MalformedMessage, match=f"wire type {wire_type} at byte 2|are not a expertmesh"
    ):
        wire.decode(Request, LATER_FIELD + bytes([2 << 3 | wire_type]))


def test_fixed_width_fields_of_a_newer_peer_are_skipped() -> None:
    unknown = b"\xa1\x01" + bytes(8) + b"\xad\x01" + bytes(4)  # fields 20 and 21
    newer = Request.FromString(unknown)
    newer.id = 9
    decoded, view = wire.decode(Request, wire.encode(newer, b"rows"), needs_checksum=True)
    assert decoded.id == 9
    assert bytes(view) == b"rows"
