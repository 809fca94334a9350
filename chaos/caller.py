"""A process that calls a mesh and compares every answer: `python -m chaos.caller JSON`.

Writes a record of each call to a file as it goes. On SIGTERM it finishes the calls under way and
prints the errors it saw. Imports no torch: it is small and starts fast.
"""

import asyncio
import json
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import grpc

from chaos.answers import CALLS, Answer, Call
from expertmesh.client.failures import error_of
from expertmesh.runtime.channels import channel_options
from expertmesh.runtime.errors import ExpertMeshError

RECORD = struct.Struct("<ddHHHH")
"""Start (s, CLOCK_MONOTONIC, which all processes of a host share), longest wait (s), kind of error
(0: none), rows asked, rows that are not equal bit by bit, rows with NaN."""
_FLUSH_S = 0.1


@dataclass(frozen=True)
class CallerArgs:
    """What a caller does.

    Args:
        target: gRPC target of one server or several.
        batches: directory of N.request and N.expected.
        records: file to write.
        method: of `chaos.answers.CALLS`.
        callers: calls at a time.
        pause_s: of each caller between calls.
        retries: whether gRPC tries again what a server did not answer, as the client ships; without
            it callers see every failure.
    """

    target: str
    batches: str
    records: str
    method: str = "Dispatch"
    callers: int = 4
    timeout_s: float = 5.0
    pause_s: float = 0.0
    retries: bool = False


@dataclass
class ErrorKind:
    """Errors with the same code and reason."""

    code: str
    reason: str
    message: str
    """Of the first."""
    fields: dict[str, str]
    """Of the first."""


class _Caller:
    def __init__(self, args: CallerArgs, write: Callable[[bytes], object]) -> None:
        self.stopping = asyncio.Event()
        self.errors: list[ErrorKind] = []
        self._args = args
        self._write = write
        self._kinds: dict[tuple[str, str], int] = {}
        self._batches = [
            (path.read_bytes(), path.with_suffix(".expected").read_bytes())
            for path in sorted(Path(args.batches).glob("*.request"))
        ]

    async def run(self) -> None:
        """Until stopping."""
        args = self._args
        options = [*channel_options(), ("grpc.enable_retries", int(args.retries))]
        async with grpc.aio.insecure_channel(args.target, options=options) as channel:
            call = CALLS[args.method](args.target, channel)
            each = len(self._batches) // args.callers or 1
            loops = (self._loop(call, number * each) for number in range(args.callers))
            await asyncio.gather(*loops)

    async def _loop(self, call: Call, number: int) -> None:
        while not self.stopping.is_set():
            number = (number + 1) % len(self._batches)
            await self._call(call, *self._batches[number])
            if self._args.pause_s:
                await asyncio.sleep(self._args.pause_s)

    async def _call(self, call: Call, request: bytes, expected: bytes) -> None:
        started_s = time.monotonic()
        kind, answer = 0, Answer(0, 0, 0, 0.0)
        try:
            answer = await call(request, expected, self._args.timeout_s)
        except (grpc.aio.AioRpcError, ExpertMeshError) as failure:
            answer = Answer(0, 0, 0, time.monotonic() - started_s)
            kind = self._kind(_typed(failure))
        counts = (kind, answer.rows, answer.inexact, answer.not_numbers)
        self._write(RECORD.pack(started_s, answer.longest_s, *counts))

    def _kind(self, error: ExpertMeshError) -> int:
        key = error.code.name, error.reason()
        if key not in self._kinds:
            self._kinds[key] = len(self._kinds) + 1
            self.errors.append(ErrorKind(*key, error.message, error.fields))
        return self._kinds[key]


def _typed(failure: "grpc.aio.AioRpcError | ExpertMeshError") -> ExpertMeshError:
    return failure if isinstance(failure, ExpertMeshError) else error_of(failure)


async def _main(args: CallerArgs, records: IO[bytes]) -> None:
    caller = _Caller(args, records.write)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, caller.stopping.set)

    async def flush() -> None:
        while True:
            await asyncio.sleep(_FLUSH_S)
            records.flush()

    flushing = asyncio.create_task(flush())
    await caller.run()
    flushing.cancel()
    print(json.dumps([asdict(error) for error in caller.errors]), flush=True)


if __name__ == "__main__":
    given = CallerArgs(**json.loads(sys.argv[1]))
    with Path(given.records).open("wb") as file:
        asyncio.run(_main(given, file))
