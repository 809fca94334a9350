"""Calls of the public services, each compared with what transformers gives.

A row is a token: its hidden state for Dispatch, the token itself for Generate.
"""

import time
from collections.abc import AsyncIterable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from expertmesh.client.generate import AsyncClient
from expertmesh.v1 import generate_pb2, router_pb2

_NAN_EXPONENT = 0x7F80
"""Of bfloat16: NaN or infinity."""


@dataclass(frozen=True)
class Answer:
    """What came, beside what should have."""

    rows: int
    inexact: int
    """Rows that are not equal bit by bit."""
    not_numbers: int
    """Rows with NaN or infinity."""
    longest_s: float
    """The longest wait: for the answer, or for the next piece of a stream."""


Call = Callable[[bytes, bytes, float], Coroutine[Any, Any, Answer]]
"""(request, expected answer, timeout in seconds); raises ExpertMeshError, or what gRPC raises."""


def dispatch(target: str, channel: Any) -> Call:
    """RouterService.Dispatch of bfloat16 rows."""
    ask = channel.unary_unary(
        "/expertmesh.v1.RouterService/Dispatch",
        response_deserializer=router_pb2.DispatchResponse.FromString,
    )

    async def call(request: bytes, expected: bytes, timeout_s: float) -> Answer:
        wanted = router_pb2.DispatchResponse.FromString(expected).hidden
        started_s = time.monotonic()
        reply = await ask(request, timeout=timeout_s)
        took_s = time.monotonic() - started_s
        return Answer(
            wanted.shape[0], *_wrong_rows(reply.hidden.data, wanted.data, wanted.shape[0]), took_s
        )

    return call


def _wrong_rows(got: bytes, wanted: bytes, num_rows: int) -> tuple[int, int]:
    """Rows that differ, and rows that are no numbers."""
    if got == wanted:
        return 0, 0
    if len(got) != len(wanted):
        return num_rows, 0
    width = len(wanted) // num_rows
    parts = [slice(row * width, (row + 1) * width) for row in range(num_rows)]
    wrong = sum(got[part] != wanted[part] for part in parts)
    return wrong, sum(_no_number(got[part]) for part in parts)


def _no_number(row: bytes) -> bool:
    return any(bits & _NAN_EXPONENT == _NAN_EXPONENT for bits in memoryview(row).cast("H"))


def generate(target: str, channel: Any) -> Call:
    """GenerateService.Generate, greedy, over a channel of the caller's."""
    ask = channel.unary_stream(
        "/expertmesh.v1.GenerateService/Generate",
        response_deserializer=generate_pb2.GenerateResponse.FromString,
    )

    async def call(request: bytes, expected: bytes, timeout_s: float) -> Answer:
        return await _compared(ask(request, timeout=timeout_s), expected)

    return call


def client(target: str, channel: Any) -> Call:
    """The same with the package's own client, which takes up what broke off."""
    own = AsyncClient(target)

    async def call(request: bytes, expected: bytes, timeout_s: float) -> Answer:
        asked = generate_pb2.GenerateRequest.FromString(request)
        return await _compared(own.generate(asked, timeout_s), expected)

    return call


async def _compared(pieces: AsyncIterable[Any], expected: bytes) -> Answer:
    wanted = list(generate_pb2.GenerateResponse.FromString(expected).tokens)
    tokens: list[int] = []
    longest_s, heard_s = 0.0, time.monotonic()
    async for piece in pieces:
        now_s = time.monotonic()
        longest_s, heard_s = max(longest_s, now_s - heard_s), now_s
        tokens += piece.tokens
    pairs = zip(tokens, wanted, strict=False)
    wrong = sum(got != own for got, own in pairs) + abs(len(tokens) - len(wanted))
    return Answer(len(wanted), wrong, 0, longest_s)


CALLS: dict[str, Callable[[str, Any], Call]] = {
    "Dispatch": dispatch,
    "Generate": generate,
    "Client": client,
}
"""Calls by name, of a target and an open channel to it."""
