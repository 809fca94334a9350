"""One long-lived ComputeStream to one replica, shared by all calls, answers matched by id."""

import asyncio
import itertools
import logging
from typing import Any

import grpc

from expertmesh.runtime import wire
from expertmesh.runtime.channels import connect
from expertmesh.runtime.errors import (
    DeadlineExceeded,
    ExpertMeshError,
    MessageTooLarge,
    StreamClosed,
    from_status,
)
from expertmesh.v1 import expert_pb2

logger = logging.getLogger(__name__)

_METHOD = "/expertmesh.v1.ExpertService/ComputeStream"
Answer = tuple[expert_pb2.ComputeResponse, memoryview]


class ReplicaStream:
    """Sends packed requests and awaits their answers; after `closed` is set it must be replaced.

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
        self._pending: dict[int, asyncio.Future[Answer]] = {}
        self._write_lock = asyncio.Lock()
        self._writes: set[asyncio.Task[None]] = set()
        self._reader = asyncio.create_task(self._read(), name=f"stream {address}")

    async def compute(
        self,
        request: expert_pb2.ComputeRequest,
        payload: wire.Buffer,
        num_rows: int,
        timeout_s: float,
    ) -> Answer:
        """Send one request and wait for its answer.

        Raises:
            StreamClosed: the connection broke; the request may or may not have been computed.
            DeadlineExceeded: no answer in `timeout_s`; a late one is dropped.
            MessageTooLarge: the request is above the size limit; nothing was sent.
            ExpertMeshError: what the replica answered.
        """
        request.id = next(self._ids)
        request.timeout_ms = max(1, int(timeout_s * 1e3))
        data = wire.encode(request, payload)
        self._check_size(len(data))
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[request.id] = answer
        self.in_flight_rows += num_rows
        # a task of its own: cancelling a write half way would end the stream for all its callers
        write = asyncio.create_task(self._write(data, answer))
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"replica at {self.address} did not answer within {timeout_s:.3f} s",
                address=self.address,
            ) from error
        finally:
            self.in_flight_rows -= num_rows
            self._pending.pop(request.id, None)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_message_bytes:
            raise MessageTooLarge(
                f"a message of {num_bytes} bytes is above max_message_bytes "
                f"{self._max_message_bytes}; send fewer rows per call or raise the limit",
                bytes=num_bytes,
                max_message_bytes=self._max_message_bytes,
            )

    async def _write(self, data: bytes, answer: asyncio.Future[Answer]) -> None:
        try:
            async with self._write_lock:  # writes of one grpc.aio stream must not overlap
                if not answer.done():  # its caller has not given up
                    await self._call.write(data)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            if not answer.done():
                answer.set_exception(self._broken(error))

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
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(self._broken(error))

    def _deliver(self, data: bytes) -> None:
        response, payload = wire.decode(expert_pb2.ComputeResponse, data)
        answer = self._pending.get(response.id)
        if answer is None or answer.done():
            return  # its caller has given up
        if response.HasField("error"):
            answer.set_exception(from_status(response.error))
        else:
            answer.set_result((response, payload))

    def _broken(self, error: BaseException | None) -> StreamClosed:
        cause = ""
        if isinstance(error, grpc.RpcError):
            cause = f": {error.code().name} {error.details() or ''}".rstrip()
        message = f"the stream to {self.address} broke{cause}"
        return StreamClosed(message, address=self.address)

    async def close(self) -> None:
        """End the stream; pending calls fail with StreamClosed."""
        self._end(None)
        tasks = [self._reader, *self._writes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._channel.close()
