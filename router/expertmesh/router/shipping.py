"""Sending the rows of a call to the replicas that the plan names, and filing their outputs.

T tokens, D hidden size, R rows: of one replica, S rows: of a call. A slot is one (token, k) pair.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from expertmesh.router.plan import Shipment
from expertmesh.router.snapshot import Life, Replica
from expertmesh.router.streams import Answer, ReplicaStream
from expertmesh.runtime.errors import DeadlineExceeded, InternalError
from expertmesh.runtime.telemetry import Telemetry
from expertmesh.runtime.tensors import bytes_of, to_bytes, wire_dtype
from expertmesh.v1 import expert_pb2

STAGE = "router"


@dataclass(frozen=True)
class Parcel:
    """What a replica is asked: one shipment's rows, a part of the call's."""

    replica: Replica
    shipment: Shipment
    rows: memoryview
    """Bytes of the shipment's rows."""
    outputs: memoryview
    """Where the bytes of their outputs belong."""


@dataclass(frozen=True)
class CallRows:
    """The rows of one call in the order of the plan: each shipment's lie side by side.

    One gather and one scatter for the whole call, whatever the number of replicas; between them
    rows are only bytes.
    """

    layer: int
    rows_SD: torch.Tensor
    outputs_SD: torch.Tensor
    slots_S: torch.Tensor
    """The slot of each row."""

    @classmethod
    def gather(
        cls, layer: int, hidden_TD: torch.Tensor, top_k: int, shipments: Sequence[Shipment]
    ) -> "CallRows":
        """The rows that the shipments name."""
        slots_S = torch.tensor([slot for shipment in shipments for slot in shipment.slots_R])
        rows_SD = hidden_TD.index_select(0, slots_S.div(top_k, rounding_mode="floor"))
        return cls(layer, rows_SD, torch.empty_like(rows_SD), slots_S)

    def parcels(
        self, shipments: Sequence[Shipment], replicas: Iterable[Replica]
    ) -> Iterator[Parcel]:
        """Each shipment with its share of the rows' memory."""
        rows, outputs = to_bytes(self.rows_SD), bytes_of(self.outputs_SD)
        row_bytes = self.rows_SD.shape[1] * self.rows_SD.itemsize
        start = 0
        for shipment, replica in zip(shipments, replicas, strict=True):
            stop = start + len(shipment.slots_R) * row_bytes
            yield Parcel(replica, shipment, rows[start:stop], outputs[start:stop])
            start = stop


class Shipper:
    """The streams to all replicas, opened when first used.

    Args:
        model: name of the model in requests.
        max_message_bytes: larger shipments are refused.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        model: str,
        telemetry: Telemetry,
        max_message_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._model = model
        self._telemetry = telemetry
        self._metrics = telemetry.metrics
        self._max_message_bytes = max_message_bytes
        self._clock = clock
        self._streams: dict[Life, ReplicaStream] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def ship(
        self, call: CallRows, parcels: Sequence[Parcel], timeout_s: float
    ) -> list[asyncio.Future[Answer]]:
        """Send all parcels at once; every future is done when this returns.

        What came is in `call.outputs_SD`; what failed is the exception of its future.

        Raises:
            DeadlineExceeded: some replica has not answered within `timeout_s`.
            MessageTooLarge: nothing more was sent.
        """
        if timeout_s <= 0:
            names = ", ".join(parcel.replica.name for parcel in parcels)
            raise DeadlineExceeded(f"layer {call.layer}: no time left to ask {names}")
        answers: list[asyncio.Future[Answer]] = []
        try:
            for parcel in parcels:
                answers.append(self._send(call, parcel, timeout_s))
            _, late = await asyncio.wait(answers, timeout=timeout_s)
        finally:
            for answer in answers:
                answer.cancel()  # does nothing to those that are done
        if late:
            parcel = next(p for p, a in zip(parcels, answers, strict=True) if a in late)
            address = parcel.replica.state.address
            raise DeadlineExceeded(
                f"replica at {address} did not answer within {timeout_s:.3f} s", address=address
            )
        for parcel, answer in zip(parcels, answers, strict=True):
            if not answer.exception():
                _file(answer.result(), call, parcel)
        return answers

    def _send(self, call: CallRows, parcel: Parcel, timeout_s: float) -> asyncio.Future[Answer]:
        replica, shipment, hidden_size = parcel.replica, parcel.shipment, call.rows_SD.shape[1]
        group, num_rows = replica.state.group, len(shipment.slots_R)
        request = expert_pb2.ComputeRequest(
            model=self._model,
            layer=call.layer,
            experts=shipment.experts,
            rows_per_expert=shipment.rows_per_expert,
            dtype=wire_dtype(call.rows_SD.dtype, "hidden.dtype"),
            hidden_size=hidden_size,
        )
        span = self._span(parcel, request)
        started_s = self._clock()
        answer = self._stream(replica).send(request, parcel.rows, num_rows, timeout_s)
        self._metrics.in_flight_rows.add(num_rows, STAGE, group)

        def done(answer: asyncio.Future[Answer]) -> None:
            self._metrics.in_flight_rows.add(-num_rows, STAGE, group)
            error = None if answer.cancelled() else answer.exception()
            if span:
                _end(span, error)
            if not answer.cancelled() and not error:
                response = answer.result()[0]
                away_s = (response.queue_us + response.compute_us) / 1e6
                self._metrics.transport_time.record(self._clock() - started_s - away_s, group)
                self._metrics.rows.add(num_rows, STAGE, group)

        answer.add_done_callback(done)
        return answer

    def _span(self, parcel: Parcel, request: expert_pb2.ComputeRequest) -> Span | None:
        """A running span that the replica's spans are children of; None if it is not recorded."""
        if not self._telemetry.enabled:
            return None
        span, request.traceparent = self._telemetry.start("router.send", kind=SpanKind.CLIENT)
        if not span.is_recording():
            return None
        span.set_attribute("expertmesh.replica", parcel.replica.name)
        span.set_attribute("expertmesh.rows", len(parcel.shipment.slots_R))
        return span

    def _stream(self, replica: Replica) -> ReplicaStream:
        stream = self._streams.get(replica.life)
        if stream is not None and stream.closed:
            self._drop(replica.life, stream)
            stream = None
        if stream is None:
            stream = ReplicaStream(replica.state.address, self._max_message_bytes)
            self._streams[replica.life] = stream
        return stream

    def in_flight_rows(self, life: Life) -> int:
        """Rows sent to a replica and not yet answered."""
        stream = self._streams.get(life)
        return stream.in_flight_rows if stream else 0

    def keep_only(self, lives: Iterable[Life]) -> None:
        """Close the streams to all other replicas; what is pending on them fails and is retried."""
        gone = self._streams.keys() - set(lives)
        for life in gone:
            self._drop(life, self._streams[life])

    def _drop(self, life: Life, stream: ReplicaStream) -> None:
        del self._streams[life]
        task = asyncio.get_running_loop().create_task(stream.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """End all streams."""
        self.keep_only(())
        await asyncio.gather(*self._closing)


def _end(span: Span, error: BaseException | None) -> None:
    if error:
        span.record_exception(error)
        span.set_status(Status(StatusCode.ERROR, str(error)))
    span.end()


def _file(answer: Answer, call: CallRows, parcel: Parcel) -> None:
    """Copy the rows to their place; an answer of another form than asked for is a bug, never a
    number."""
    response, payload = answer
    dtype, hidden_size = wire_dtype(call.rows_SD.dtype), call.rows_SD.shape[1]
    got = (response.dtype, response.hidden_size, len(payload))
    asked = (dtype, hidden_size, len(parcel.outputs))
    if got != asked:
        name = parcel.replica.name
        raise InternalError(f"{name} answered (dtype, width, bytes) {got}, asked {asked}")
    parcel.outputs[:] = payload
