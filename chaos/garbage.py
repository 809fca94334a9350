"""Answers as a defective replica, or a defective way from it, would give them."""

from collections.abc import Callable
from random import Random

from expertmesh.v1 import expert_pb2, tensor_pb2

Reply = tuple[expert_pb2.ComputeResponse, memoryview]
"""Header and rows, before they are made a message with a checksum."""


class Garbler:
    """Garbles some of the answers that pass.

    Args:
        kind: of `KINDS`.
        frac: share of the answers that are garbled.
        on_garbled: told of each that is.
    """

    def __init__(
        self,
        kind: str,
        frac: float,
        on_garbled: Callable[[], object] = int,
        random: Random | None = None,
    ) -> None:
        self._kind = kind
        self._frac = frac
        self._on_garbled = on_garbled
        self._random = random or Random(0)

    def reply(self, header: expert_pb2.ComputeResponse, rows: memoryview) -> Reply:
        """The answer, or what a wrong program makes of it; its checksum will be right."""
        if self._kind not in WRONG_PROGRAMS or not self._draw():
            return header, rows
        return WRONG_PROGRAMS[self._kind](header, rows)

    def message(self, data: bytes) -> bytes:
        """The message, or what has become of it after its checksum was taken."""
        if self._kind not in WRONG_BYTES or not self._draw():
            return data
        return WRONG_BYTES[self._kind](bytearray(data), self._random)

    def _draw(self) -> bool:
        if self._random.random() >= self._frac:
            return False
        self._on_garbled()
        return True


def _flip(data: bytearray, random: Random) -> bytes:
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def _swap(data: bytearray, random: Random) -> bytes:
    half = len(data) // 2
    return bytes(data[: half // 2] + data[half:] + data[half // 2 : half])


def _cut(data: bytearray, random: Random) -> bytes:
    return bytes(data[: random.randrange(len(data))])


def _noise(data: bytearray, random: Random) -> bytes:
    return random.randbytes(len(data))


def _missing_rows(header: expert_pb2.ComputeResponse, rows: memoryview) -> Reply:
    return header, rows[: len(rows) // 2]


def _old_id(header: expert_pb2.ComputeResponse, rows: memoryview) -> Reply:
    header.id = max(header.id - 10_000, 0)
    return header, rows


def _width(header: expert_pb2.ComputeResponse, rows: memoryview) -> Reply:
    header.hidden_size *= 2
    return header, rows


def _dtype(header: expert_pb2.ComputeResponse, rows: memoryview) -> Reply:
    header.dtype = tensor_pb2.DTYPE_FLOAT16
    return header, rows


def _nothing(header: expert_pb2.ComputeResponse, rows: memoryview) -> Reply:
    return expert_pb2.ComputeResponse(id=header.id), memoryview(b"")


WRONG_BYTES: dict[str, Callable[[bytearray, Random], bytes]] = {
    "flip": _flip,
    "swap": _swap,
    "cut": _cut,
    "noise": _noise,
}
"""One bit turned over; pieces in another order; cut short; other bytes."""
WRONG_PROGRAMS: dict[str, Callable[[expert_pb2.ComputeResponse, memoryview], Reply]] = {
    "missing_rows": _missing_rows,
    "old_id": _old_id,
    "width": _width,
    "dtype": _dtype,
    "nothing": _nothing,
}
"""Half of the rows; an id that nobody waits for; another width; another element type; only an
id."""
KINDS = (*WRONG_BYTES, *WRONG_PROGRAMS)
