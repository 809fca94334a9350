"""One long-lived ComputeStream to one replica, shared by all calls, answers matched by id."""

import asyncio
import itertools
import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

import grpc

from expertmesh.runtime import wire
from expertmesh.runtime.channels import connect
from expertmesh.runtime.errors import ExpertMeshError, MessageTooLarge, StreamClosed, from_status
from expertmesh.v1 import expert_pb2

logger = logging.getLogger(__name__)

_METHOD = "/expertmesh.v1.ExpertService/ComputeStream"
Answer = tuple[expert_pb2.ComputeResponse, memoryview]


@dataclass(frozen=True)
class _Asked:
    answer: asyncio.Future[Answer]
    num_rows: int


class ReplicaStream:
    """Sends packed requests and awaits their answers; after `closed` is set it must be replaced.

    Two tasks live as long as the stream: one writes, one reads. A call costs neither a task nor a
    timer of its own.

    Args:
        address: "host:port" of the replica.
        max_message_bytes: larger requests are refused before they are sent.
    """

    def __init__(self, address: str, max_message_bytes: int) -> None:
        self.address = address
        self.closed = False
        self.in_flight_rows = 0
        self._max_message_bytes = max_message_bytes
        self._channel = connect(address, max_message_bytes)
        # identity serializers: payloads are framed by `wire`
        self._call: Any = self._channel.stream_stream(_METHOD)()
        self._ids = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._outgoing: deque[tuple[int, bytes]] = deque()
        self._more = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._write(), name=f"writes to {address}"),
            asyncio.create_task(self._read(), name=f"reads from {address}"),
        ]

    def send(
        self,
        request: expert_pb2.ComputeRequest,
        payload: wire.Buffer,
        num_rows: int,
        timeout_s: float,
    ) -> asyncio.Future[Answer]:
        """Queue one request; the future is its answer.

        Whoever cancels the future drops the answer, and the request if it is not yet on its way.
        Its exception is StreamClosed if the connection broke (the request may or may not have been
        computed), or what the replica answered.

        Args:
            timeout_s: told to the replica, which need not compute what nobody waits for.

        Raises:
            MessageTooLarge: the request is above the size limit; nothing was sent.
        """
        number = request.id = next(self._ids)
        request.timeout_ms = max(1, int(timeout_s * 1e3))
        data = wire.encode(request, payload)
        self._check_size(len(data))
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if self.closed:
            answer.set_exception(self._broken(None))
            return answer
        self._asked[number] = _Asked(answer, num_rows)
        self.in_flight_rows += num_rows
        answer.add_done_callback(lambda _: self._settle(number))
        self._outgoing.append((number, data))
        self._more.set()
        return answer

    def _settle(self, number: int) -> None:
        self.in_flight_rows -= self._asked.pop(number).num_rows

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_message_bytes:
            raise MessageTooLarge(
                f"a message of {num_bytes} bytes is above max_message_bytes "
                f"{self._max_message_bytes}; send fewer rows per call or raise the limit",
                bytes=num_bytes,
                max_message_bytes=self._max_message_bytes,
            )

    async def _write(self) -> None:
        try:
            while True:
                await self._more.wait()
                self._more.clear()
                while self._outgoing:
                    number, data = self._outgoing.popleft()
                    if number in self._asked:  # its caller has not given up
                        await self._call.write(data)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            self._end(error)

    async def _read(self) -> None:
        error: BaseException | None = None
        try:
            while (data := await self._call.read()) is not grpc.aio.EOF:
                self._deliver(data)
        except (grpc.RpcError, ExpertMeshError) as broken:
            error = broken
        finally:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        """Nothing more will come: who waits must know."""
        self.closed = True
        for asked in self._asked.values():
            if not asked.answer.done():
                asked.answer.set_exception(self._broken(error))

    def _deliver(self, data: bytes) -> None:
        response, payload = wire.decode(expert_pb2.ComputeResponse, data)
        asked = self._asked.get(response.id)
        if asked is None or asked.answer.done():
            return  # its caller has given up
        if response.HasField("error"):
            asked.answer.set_exception(from_status(response.error))
        else:
            asked.answer.set_result((response, payload))

    def _broken(self, error: BaseException | None) -> StreamClosed:
        cause = ""
        if isinstance(error, grpc.RpcError):
            cause = f": {error.code().name} {error.details() or ''}".rstrip()
        message = f"the stream to {self.address} broke{cause}"
        return StreamClosed(message, address=self.address)

    async def close(self) -> None:
        """End the stream; pending calls fail with StreamClosed."""
        self._end(None)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()
