"""Zero-copy framing of messages whose last field is one large `bytes` field with number 15.

The bytes on the wire are ordinary protobuf (https://protobuf.dev/programming-guides/encoding/), so
any stock client reads and writes them; but protobuf's Python runtime copies a `bytes` field several
times, which costs more than gRPC itself above 1 MB. Here the sender joins header and payload once
and the receiver gets a view.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar, cast

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from xxhash import xxh3_64, xxh3_64_intdigest

from expertmesh.runtime.errors import MalformedMessage

CHECKSUM_FIELD = 14
PAYLOAD_FIELD = 15
_SMALL_BYTES = 16 << 10
"""Up to here protobuf's copies are cheaper than looking for the payload in Python."""
_UNSCANNED_BYTES = 64 << 10
"""Up to here nobody minds how much larger the message's objects are."""
MAX_FIELDS = 1 << 16
"""Of a large message: each may become an object of a hundred bytes."""
MAX_STRUCTURE_BYTES = 4 << 20
"""Of a large message, besides `bytes` and `string`: each may become a number of eight bytes."""
_MAX_DEPTH = 32
_LENGTH_DELIMITED = 2
_TAG = bytes([PAYLOAD_FIELD << 3 | _LENGTH_DELIMITED])
_FIXED64 = 1
_CHECKSUM_TAG = bytes([CHECKSUM_FIELD << 3 | _FIXED64])
_TAIL_BYTES = len(_CHECKSUM_TAG) + 8 + len(_TAG)
"""From the checksum's tag to the payload's length."""
_FIXED_BYTES = {1: 8, 5: 4}  # wire type -> size

M = TypeVar("M", bound=Message)
Buffer = bytes | bytearray | memoryview
Encoded = bytes | bytearray
"""A message as it was received."""


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_head(header: Message, *payload: Buffer) -> bytes:
    """What comes before the payload in the encoded message.

    Args:
        header: a message whose fields 14 and 15 are unset.
        payload: flat bytes, in parts.
    """
    fields = header.SerializeToString()
    if len(payload) == 1:
        num_bytes = len(payload[0])
        checksum = xxh3_64_intdigest(payload[0], xxh3_64_intdigest(fields))
    else:
        num_bytes = sum(map(len, payload))
        checksum = _checksum(fields, payload)
    return b"".join(
        (fields, _CHECKSUM_TAG, checksum.to_bytes(8, "little"), _TAG, _varint(num_bytes))
    )


def _checksum(fields: Buffer, payload: Sequence[Buffer]) -> int:
    running = xxh3_64(seed=xxh3_64_intdigest(fields))
    for part in payload:
        running.update(part)
    return running.intdigest()


def encode(header: Message, payload: Buffer) -> bytes:
    """`header` serialised, with `payload` as its field 15. The payload is copied once.

    Args:
        header: see `encode_head`.
        payload: C-contiguous bytes.
    """
    view = memoryview(payload).cast("B")
    return b"".join((encode_head(header, view), view))


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


def _scan(data: memoryview) -> tuple[int, int] | None:
    """(start of its tag, first byte) of field 15 if it is there once, at the end.

    Raises:
        MalformedMessage: no protobuf, or so much besides the payload that its objects would take
            many times the memory of the message.
        IndexError: cut short.
    """
    at, end, num_fields, num_payloads, bulk_bytes = 0, len(data), 0, 0, 0
    start = first = key = 0
    while at < end:
        start = at
        key, first, at = _field(data, start)
        if key == _TAG[0]:
            num_payloads, bulk_bytes = num_payloads + 1, bulk_bytes + at - first
        num_fields += 1
        _check_structure(num_fields, at - bulk_bytes)
    return (start, first) if key == _TAG[0] and num_payloads == 1 else None


def _check_structure(num_fields: int, num_bytes: int) -> None:
    """Whether what protobuf makes objects of is small enough."""
    if num_fields > MAX_FIELDS or num_bytes > MAX_STRUCTURE_BYTES:
        raise MalformedMessage(
            f"a message of more than {MAX_FIELDS} fields, or {MAX_STRUCTURE_BYTES} bytes besides "
            "its payload"
        )


def decode(
    message_type: type[M], data: Encoded, *, needs_checksum: bool = False
) -> tuple[M, memoryview]:
    """(header without payload, view of the payload) of an encoded message.

    Any valid encoding is accepted; a small one, or one with fields behind the payload, is copied by
    protobuf. A checksum is checked.

    Args:
        needs_checksum: refuse messages without one.

    Raises:
        MalformedMessage: `data` is not an encoding of `message_type`, was changed on its way, or is
            one of `_scan`'s bombs.
    """
    try:
        header, payload = _parse(message_type, data)
    except (IndexError, DecodeError) as error:
        raise _malformed(message_type, data) from error
    checksum: int = header.checksum  # type: ignore[attr-defined]  # as PAYLOAD_FIELD, of all of ours
    if checksum or needs_checksum:
        _check(message_type, data, payload, checksum)
    return header, payload


def _parse(message_type: type[M], data: Encoded) -> tuple[M, memoryview]:
    if len(data) > _SMALL_BYTES:
        view = memoryview(data)
        payload_at = _scan(view)
        if payload_at is not None:
            start, first = payload_at
            return message_type.FromString(cast(bytes, data[:start])), view[first:]
    message = message_type.FromString(cast(bytes, data))
    name = _payload_name(message_type.DESCRIPTOR)
    payload = memoryview(getattr(message, name))
    message.ClearField(name)
    return message, payload


def _check(message_type: type[Message], data: Encoded, payload: memoryview, checksum: int) -> None:
    size = len(payload)
    length_bytes = (size.bit_length() + 6) // 7 or 1
    at = len(data) - size - length_bytes - _TAIL_BYTES
    if at >= 0 and data[at] == _CHECKSUM_TAG[0]:
        seed = xxh3_64_intdigest(data[:at])
        if xxh3_64_intdigest(payload, seed) == checksum:
            return
    problem = "does not match its checksum" if checksum else "has no checksum"
    raise MalformedMessage(
        f"a {message_type.DESCRIPTOR.full_name} of {len(data)} bytes {problem}; "
        "it was changed on its way, or written by something that is not a mesh process"
    )


def decode_whole(message_type: type[M], data: Encoded) -> M:
    """The message, with all that is in it.

    Raises:
        MalformedMessage: as `decode`.
    """
    try:
        if len(data) > _UNSCANNED_BYTES:
            _Structure().walk(memoryview(data), message_type.DESCRIPTOR)
        return message_type.FromString(cast(bytes, data))
    except (IndexError, DecodeError) as error:
        raise _malformed(message_type, data) from error


class _Structure:
    """Counts the fields of a message and those in it, and what is neither `bytes` nor `string`."""

    def __init__(self) -> None:
        self._num_fields = 0
        self._num_bytes = 0

    def walk(self, data: memoryview, message_type: Any, depth: int = 0) -> None:
        """Raise MalformedMessage if there are too many, IndexError if it is cut short."""
        if depth > _MAX_DEPTH:
            raise MalformedMessage(f"messages in messages, more than {_MAX_DEPTH} deep")
        fields, at, end = message_type.fields_by_number, 0, len(data)
        while at < end:
            start = at
            key, first, at = _field(data, start)
            field = fields.get(key >> 3)
            is_bulk = field is not None and field.type in (field.TYPE_BYTES, field.TYPE_STRING)
            if field is not None and field.message_type and key & 7 == _LENGTH_DELIMITED:
                self.walk(data[first:at], field.message_type, depth + 1)
                is_bulk = True  # what is in it has been counted
            self._num_fields += 1
            self._num_bytes += (first if is_bulk else at) - start
            _check_structure(self._num_fields, self._num_bytes)


def _field(data: memoryview, start: int) -> tuple[int, int, int]:
    """(key, first byte of the value, one past its last byte) of the field that begins at `start`.

    Raises:
        MalformedMessage: no field of proto3.
        IndexError: it is longer than the data.
    """
    key, first = _read_varint(data, start)
    wire_type = key & 7
    if wire_type == 0:
        return key, first, _read_varint(data, first)[1]
    if wire_type == _LENGTH_DELIMITED:
        size, first = _read_varint(data, first)
    elif wire_type in _FIXED_BYTES:
        size = _FIXED_BYTES[wire_type]
    else:
        raise MalformedMessage(f"wire type {wire_type} at byte {start}; expected protobuf")
    if first + size > len(data):
        raise IndexError("a field is longer than its message")
    return key, first, first + size


def _malformed(message_type: type[Message], data: Encoded) -> MalformedMessage:
    return MalformedMessage(
        f"{len(data)} bytes are not a {message_type.DESCRIPTOR.full_name}; "
        "the message was cut short or the peer speaks another protocol"
    )


@cache
def _payload_name(message_type: Descriptor) -> str:
    return str(message_type.fields_by_number[PAYLOAD_FIELD].name)
