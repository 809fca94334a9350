"""Sending the rows of one shipment to one replica and getting its outputs back.

T tokens, D hidden size, R rows. A slot is one (token, k) pair.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from opentelemetry.trace import SpanKind

from expertmesh.router.plan import Shipment
from expertmesh.router.snapshot import Replica
from expertmesh.router.streams import Answer, ReplicaStream
from expertmesh.runtime.errors import DeadlineExceeded, InternalError
from expertmesh.runtime.telemetry import Telemetry, inject
from expertmesh.runtime.tensors import from_bytes, to_bytes, wire_dtype
from expertmesh.v1 import control_pb2, expert_pb2

STAGE = "router"
Life = tuple[str, int]
"""(replica id, incarnation)"""


@dataclass(frozen=True)
class Delivery:
    """What a replica answered."""

    slots_R: torch.Tensor
    """The slot of each row."""
    rows_RD: torch.Tensor
    """Unweighted outputs."""
    load: control_pb2.ReplicaLoad


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
        self,
        replica: Replica,
        layer: int,
        hidden_TD: torch.Tensor,
        top_k: int,
        shipment: Shipment,
        timeout_s: float,
    ) -> Delivery:
        """Send the shipment's rows and wait for their outputs.

        Raises:
            StreamClosed, Draining, QueueFull: another replica may do it.
            DeadlineExceeded, MessageTooLarge, ExpertMeshError: final.
        """
        if timeout_s <= 0:
            raise DeadlineExceeded(f"layer {layer}: no time left to ask {shipment.replica}")
        slots_R = torch.tensor(shipment.slots_R)
        rows_RD = hidden_TD.index_select(0, slots_R // top_k)
        request = expert_pb2.ComputeRequest(
            model=self._model,
            layer=layer,
            experts=shipment.experts,
            rows_per_expert=shipment.rows_per_expert,
            dtype=wire_dtype(rows_RD.dtype, "hidden.dtype"),
            hidden_size=rows_RD.shape[1],
        )
        response, payload = await self._send(replica, request, rows_RD, timeout_s)
        outputs_RD = _rows_of(response, payload, rows_RD, shipment)
        return Delivery(slots_R, outputs_RD, response.load)

    async def _send(
        self,
        replica: Replica,
        request: expert_pb2.ComputeRequest,
        rows_RD: torch.Tensor,
        timeout_s: float,
    ) -> Answer:
        group, num_rows, metrics = replica.state.group, rows_RD.shape[0], self._metrics
        with self._telemetry.span("router.send", kind=SpanKind.CLIENT) as span:
            if self._telemetry.enabled:
                span.set_attribute("expertmesh.replica", replica.name)
                span.set_attribute("expertmesh.rows", num_rows)
                request.traceparent = inject()
            stream, started_s = self._stream(replica), self._clock()
            metrics.in_flight_rows.add(num_rows, STAGE, group)
            try:
                answer = await stream.compute(request, to_bytes(rows_RD), num_rows, timeout_s)
            finally:
                metrics.in_flight_rows.add(-num_rows, STAGE, group)
        away_s = (answer[0].queue_us + answer[0].compute_us) / 1e6
        metrics.transport_time.record(self._clock() - started_s - away_s, group)
        metrics.rows.add(num_rows, STAGE, group)
        return answer

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


def _rows_of(
    response: expert_pb2.ComputeResponse,
    payload: memoryview,
    rows_RD: torch.Tensor,
    shipment: Shipment,
) -> torch.Tensor:
    """The answer's rows; an answer of another form than asked for is a bug, never a number."""
    asked = (wire_dtype(rows_RD.dtype), rows_RD.shape[1])
    if (response.dtype, response.hidden_size) != asked:
        got = (response.dtype, response.hidden_size)
        raise InternalError(f"{shipment.replica} answered (dtype, width) {got}, asked {asked}")
    return from_bytes(payload, rows_RD.dtype, rows_RD.shape, f"rows of {shipment.replica}")
