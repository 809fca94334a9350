"""Zero-copy framing of messages whose last field is one large `bytes` field with number 15.

The bytes on the wire are ordinary protobuf (https://protobuf.dev/programming-guides/encoding/), so
any stock client reads and writes them; but protobuf's Python runtime copies a `bytes` field several
times, which costs more than gRPC itself above 1 MB. Here the sender joins header and payload once
and the receiver gets a view.
"""

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from expertmesh.runtime.errors import MalformedMessage

PAYLOAD_FIELD = 15
_LENGTH_DELIMITED = 2
_TAG = bytes([PAYLOAD_FIELD << 3 | _LENGTH_DELIMITED])
_FIXED_BYTES = {1: 8, 5: 4}  # wire type -> size

M = TypeVar("M", bound=Message)
Buffer = bytes | bytearray | memoryview


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode(header: Message, payload: Buffer) -> bytes:
    """`header` serialised, with `payload` as its field 15. The payload is copied once.

    Args:
        header: a message whose field 15 is `bytes` and unset.
        payload: C-contiguous bytes.
    """
    view = memoryview(payload).cast("B")
    return b"".join((header.SerializeToString(), _TAG, _varint(view.nbytes), view))


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise MalformedMessage(
                "a varint of more than 10 bytes; the peer speaks another protocol"
            )


def _payload_span(data: memoryview) -> tuple[int, int, int] | None:
    """(start of its tag, first byte, one past the last byte) of field 15; None if absent."""
    at, end = 0, len(data)
    while at < end:
        start = at
        key, at = _read_varint(data, at)
        wire_type = key & 7
        if wire_type == 0:
            _, at = _read_varint(data, at)
        elif wire_type == _LENGTH_DELIMITED:
            size, at = _read_varint(data, at)
            if key >> 3 == PAYLOAD_FIELD:
                return start, at, at + size
            at += size
        elif wire_type in _FIXED_BYTES:
            at += _FIXED_BYTES[wire_type]
        else:
            raise MalformedMessage(f"wire type {wire_type} at byte {start}; expected protobuf")
    return None


def decode(message_type: type[M], data: bytes) -> tuple[M, memoryview]:
    """(header without payload, view of the payload) of an encoded message.

    Any valid encoding is accepted; one with fields behind the payload costs protobuf's own copy.

    Raises:
        MalformedMessage: `data` is not an encoding of `message_type`.
    """
    try:
        view = memoryview(data)
        span = _payload_span(view)
        if span is None:
            return message_type.FromString(data), view[:0]
        start, first, last = span
        if last == len(view):
            return message_type.FromString(data[:start]), view[first:last]
        message = message_type.FromString(data)
    except (IndexError, DecodeError) as error:
        raise MalformedMessage(
            f"{len(data)} bytes are not a {message_type.DESCRIPTOR.full_name}; "
            "the message was cut short or the peer speaks another protocol"
        ) from error
    field = message_type.DESCRIPTOR.fields_by_number[PAYLOAD_FIELD]
    payload = memoryview(getattr(message, field.name))
    message.ClearField(field.name)
    return message, payload
