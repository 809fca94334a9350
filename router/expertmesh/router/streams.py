"""One long-lived connection to one replica, shared by all calls, answers matched by id."""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from expertmesh.router.latency import Latencies
from expertmesh.router.links import open_link
from expertmesh.runtime import wire
from expertmesh.runtime.error_status import from_status
from expertmesh.runtime.errors import (
    ExpertMeshError,
    MessageTooLarge,
    StreamClosed,
)
from expertmesh.runtime.security.access import PLAIN, Access
from expertmesh.v1 import expert_pb2

FIRST_TRANSPORT_US = 200.0
"""Assumed until a replica has answered."""
_EWMA_WEIGHT = 0.1
_FADING_S = 0.5

Answer = tuple[expert_pb2.ComputeResponse, memoryview]
OnAnswer = Callable[[Answer | ExpertMeshError], None]


@dataclass(slots=True)
class _Asked:
    on_answer: OnAnswer
    num_rows: int
    sent_s: float
    is_wanted: bool = True


class ReplicaStream:
    """Sends packed requests and hands out their answers; once `closed` it must be replaced.

    Args:
        address: "host:port" of the replica.
        max_message_bytes: larger requests are refused before they are sent.
        local_socket: name of the replica's Unix socket, or "".
        clock: seconds, monotonic.
        access: how to connect over gRPC.
    """

    def __init__(
        self,
        address: str,
        max_message_bytes: int,
        local_socket: str = "",
        clock: Callable[[], float] = time.monotonic,
        access: Access = PLAIN,
    ) -> None:
        self.address = address
        self.closed = False
        self.in_flight_rows = 0
        """Rows sent and not answered, whether anybody still wants the answer or not."""
        self.latencies = Latencies()
        self._clock = clock
        self._heard_s = clock()
        self._transport_us = FIRST_TRANSPORT_US
        self._answered_s = 0.0
        self._max_message_bytes = max_message_bytes
        self._ids = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._link = open_link(
            address,
            local_socket,
            max_message_bytes,
            self._deliver,
            self._end,
            self._is_wanted,
            access,
        )

    def send(
        self,
        request: expert_pb2.ComputeRequest,
        rows: Sequence[memoryview],
        num_rows: int,
        timeout_s: float,
        on_answer: OnAnswer,
    ) -> int:
        """Send one request. Returns its number, for `cancel`.

        Args:
            rows: the payload in parts, which must not change before the answer is there.
            timeout_s: told to the replica, which need not compute what nobody waits for.
            on_answer: called once, later, on the event loop, unless the request is cancelled: with
                the answer, with the error the replica gave, or with StreamClosed if the connection
                broke (the request may or may not have been computed).

        Raises:
            StreamClosed: the stream is closed; nothing was sent.
            MessageTooLarge: the request is above the size limit; nothing was sent.
            QueueFull: the replica takes nothing, and too much waits for it; nothing was sent.
        """
        if self.closed:
            raise self._broken(None)
        number = request.id = next(self._ids)
        request.timeout_ms = max(1, int(timeout_s * 1e3))
        head = wire.encode_head(request, *rows)
        num_bytes = len(head) + sum(map(len, rows))
        if num_bytes > self._max_message_bytes:
            raise self._too_large(num_bytes)
        self._link.check_room(num_bytes)
        self._asked[number] = _Asked(on_answer, num_rows, self._clock())
        self.in_flight_rows += num_rows
        self._link.send(number, head, *rows)
        return number

    def cancel(self, number: int) -> None:
        """Nobody wants the answer any more. The replica takes the request out of its queue and
        says so; until then its rows count as in flight, as it may be computing them."""
        asked = self._asked.get(number)
        if asked is None:
            return
        asked.is_wanted = False
        if self.closed:
            return
        self.latencies.observe(asked.num_rows, self._clock() - asked.sent_s)
        request = expert_pb2.ComputeRequest(cancels=[number])
        self._link.send(next(self._ids), request.SerializeToString())

    def _is_wanted(self, number: int) -> bool:
        """Whether a request that waits for its turn should still be sent."""
        asked = self._asked.get(number)
        if asked is None or asked.is_wanted:
            return True
        del self._asked[number]
        self.in_flight_rows -= asked.num_rows
        return False

    def silent_s(self) -> float:
        """How long nothing has come, though there was something to answer."""
        return self._clock() - max(self._heard_s, self._oldest_s())

    def waiting_s(self) -> float:
        """How long the oldest request has been waiting for its answer."""
        return self._clock() - self._oldest_s()

    def oldest_rows(self) -> int:
        """Rows of the oldest request that is not answered; 0 if there is none."""
        oldest = next(iter(self._asked.values()), None)
        return 0 if oldest is None else oldest.num_rows

    def _oldest_s(self) -> float:
        oldest = next(iter(self._asked.values()), None)
        return self._clock() if oldest is None else oldest.sent_s

    def observe_transport(self, transport_us: float, now_s: float) -> None:
        """Account one answer."""
        self._transport_us += _EWMA_WEIGHT * (transport_us - self._transport_us)
        self._answered_s = now_s

    def observe_outrun(self, waited_us: float, now_s: float) -> None:
        """Account an answer that had not come after so long, when others were there already. What
        the replica says of itself is older than that."""
        self._transport_us = max(self._transport_us, waited_us)
        self._answered_s = now_s

    def transport_us(self, now_s: float) -> float:
        """Exponentially weighted mean time of a message there and back, without the compute. It
        fades while none comes: who was slow once is asked again."""
        fading: float = 0.5 ** ((now_s - self._answered_s) / _FADING_S)
        return FIRST_TRANSPORT_US + fading * (self._transport_us - FIRST_TRANSPORT_US)

    def _answer(self, number: int, answer: Answer | ExpertMeshError) -> None:
        asked = self._asked.pop(number, None)
        if asked is None:
            return
        self.in_flight_rows -= asked.num_rows
        if asked.is_wanted:
            if not isinstance(answer, ExpertMeshError):
                self.latencies.observe(asked.num_rows, self._clock() - asked.sent_s)
            asked.on_answer(answer)

    def _too_large(self, num_bytes: int) -> MessageTooLarge:
        return MessageTooLarge(
            f"a message of {num_bytes} bytes is above max_message_bytes "
            f"{self._max_message_bytes}; send fewer rows per call or raise the limit",
            bytes=num_bytes,
            max_message_bytes=self._max_message_bytes,
        )

    def _end(self, error: BaseException | None) -> None:
        """Nothing more will come: who waits is told, but not inside of a `send`."""
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self._fail_all, error)

    def _fail_all(self, error: BaseException | None) -> None:
        for number in list(self._asked):
            self._answer(number, self._broken(error))

    def _deliver(self, data: wire.Encoded) -> None:
        self._heard_s = self._clock()
        response, payload = wire.decode(expert_pb2.ComputeResponse, data, needs_checksum=True)
        failed = response.HasField("error")
        self._answer(response.id, from_status(response.error) if failed else (response, payload))

    def _broken(self, error: BaseException | None) -> StreamClosed:
        cause = ""
        if isinstance(error, grpc.RpcError):
            cause = f": {error.code().name} {error.details() or ''}".rstrip()
        elif isinstance(error, ExpertMeshError | OSError):
            cause = f": {error}"
        message = f"the stream to {self.address} broke{cause}"
        return StreamClosed(message, address=self.address)

    async def close(self) -> None:
        """End the stream; pending calls fail with StreamClosed."""
        self._end(None)
        await self._link.close()
