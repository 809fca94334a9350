"""ExpertService: decode, admit, batch, encode. Bytes in, bytes out; protobuf sees only headers."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc
from opentelemetry.trace import SpanKind

from expertmesh.experts.admission import Holding, admit
from expertmesh.experts.batcher import Computed, MicroBatcher
from expertmesh.runtime import wire
from expertmesh.runtime.errors import DeadlineExceeded, ExpertMeshError, MalformedMessage
from expertmesh.runtime.server import status_of
from expertmesh.runtime.telemetry import Telemetry, inject
from expertmesh.runtime.tensors import to_bytes
from expertmesh.v1 import control_pb2, expert_pb2

logger = logging.getLogger(__name__)

STAGE = "expert"
SERVICE = expert_pb2.DESCRIPTOR.services_by_name["ExpertService"].full_name


class ExpertServicer:
    """Answers Compute, ComputeStream and Describe for one replica.

    Args:
        describe: the replica's present state.
        load: the load that rides on every answer.
    """

    def __init__(
        self,
        batcher: MicroBatcher,
        holding: Holding,
        describe: Callable[[], control_pb2.ReplicaState],
        load: Callable[[], control_pb2.ReplicaLoad],
        telemetry: Telemetry,
        group: str,
    ) -> None:
        self._batcher = batcher
        self._holding = holding
        self._describe = describe
        self._load = load
        self._telemetry = telemetry
        self._metrics = telemetry.metrics
        self._group = group

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with identity serializers, so that payloads are never copied by protobuf."""
        handlers = {
            "Compute": grpc.unary_unary_rpc_method_handler(self.compute),
            "ComputeStream": grpc.stream_stream_rpc_method_handler(self.compute_stream),
            "Describe": grpc.unary_unary_rpc_method_handler(
                self.describe,
                request_deserializer=expert_pb2.DescribeRequest.FromString,
                response_serializer=control_pb2.ReplicaState.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def describe(self, request: Any, context: Any) -> control_pb2.ReplicaState:
        """The replica's state, as its heartbeat tells it."""
        return self._describe()

    async def compute(self, data: bytes, context: Any) -> bytes:
        """One packed request."""
        header, payload = wire.decode(expert_pb2.ComputeRequest, data)
        remaining_s = context.time_remaining()
        return await self._answer(header, payload, remaining_s)

    async def compute_stream(self, requests: Any, context: Any) -> None:
        """Requests as they come, each answered when its batch is done."""
        write_lock = asyncio.Lock()
        broken: MalformedMessage | None = None
        try:
            async with asyncio.TaskGroup() as answers:
                while (data := await context.read()) is not grpc.aio.EOF:
                    try:
                        header, payload = wire.decode(expert_pb2.ComputeRequest, data)
                    except MalformedMessage as error:  # has no id to answer to: it ends the stream
                        broken = error
                        break
                    answer = self._answer_on(context, write_lock, header, payload)
                    if self._batcher.computes_at_once(sum(header.rows_per_expert)):
                        await answer
                    else:
                        answers.create_task(answer)
        except* grpc.aio.BaseError as gone:
            logger.debug("a caller left before its answers: %s", gone.exceptions[0])
        if broken:  # what came before it has been answered
            raise broken

    async def _answer_on(
        self,
        context: Any,
        write_lock: asyncio.Lock,
        header: expert_pb2.ComputeRequest,
        payload: memoryview,
    ) -> None:
        try:
            data = await self._answer(header, payload, None)
        except Exception as error:
            failure = expert_pb2.ComputeResponse(
                id=header.id, error=status_of(error), load=self._load()
            )
            data = failure.SerializeToString()
        async with write_lock:  # writes of one grpc.aio stream must not overlap
            await context.write(data)

    async def _answer(
        self, header: expert_pb2.ComputeRequest, payload: memoryview, remaining_s: float | None
    ) -> bytes:
        timeout_s = header.timeout_ms / 1e3 if header.timeout_ms else remaining_s
        with self._telemetry.span(
            "expert.compute", parent=header.traceparent, kind=SpanKind.SERVER
        ) as span:
            try:
                done = await self._compute(header, payload, timeout_s)
            except ExpertMeshError as error:
                self._metrics.errors.add(1, STAGE, error.code.name)
                raise
            finally:
                self._metrics.calls.add(1, STAGE, "Compute")
            if span.is_recording():
                span.set_attributes(_attributes(header, done))
                self._record_stages(done)
        num_rows = done.rows_RD.shape[0]
        self._metrics.rows.add(num_rows, STAGE, self._group)
        self._metrics.queue_wait.record(done.queue_s, STAGE, self._group)
        return self._encode(header, done)

    async def _compute(
        self, header: expert_pb2.ComputeRequest, payload: memoryview, timeout_s: float | None
    ) -> Computed:
        rows = admit(header, payload, self._holding)
        in_flight = self._metrics.in_flight_rows
        in_flight.add(rows.num_rows, STAGE, self._group)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._batcher.submit(rows, timeout_s)
        except TimeoutError as error:
            message = f"layer {header.layer}: not computed within {timeout_s:.3f} s"
            raise DeadlineExceeded(message, layer=header.layer) from error
        finally:
            in_flight.add(-rows.num_rows, STAGE, self._group)

    def _record_stages(self, done: Computed) -> None:
        """The queue and the batch as spans of the caller's own trace."""
        end_ns = time.time_ns()
        start_ns = end_ns - int(done.compute_s * 1e9)
        queued_ns = start_ns - int(done.queue_s * 1e9)
        here = inject()
        self._telemetry.record("expert.queue", queued_ns, start_ns, parent=here)
        batch = {"expertmesh.batch_rows": done.batch_rows}
        self._telemetry.record("expert.batch", start_ns, end_ns, batch, parent=here)

    def _encode(self, header: expert_pb2.ComputeRequest, done: Computed) -> bytes:
        response = expert_pb2.ComputeResponse(
            id=header.id,
            dtype=header.dtype,
            hidden_size=header.hidden_size,
            load=self._load(),
            queue_us=int(done.queue_s * 1e6),
            compute_us=int(done.compute_s * 1e6),
        )
        return wire.encode(response, to_bytes(done.rows_RD))


def _attributes(header: expert_pb2.ComputeRequest, done: Computed) -> dict[str, Any]:
    return {
        "expertmesh.layer": header.layer,
        "expertmesh.experts": len(header.experts),
        "expertmesh.rows": done.rows_RD.shape[0],
        "expertmesh.batch_rows": done.batch_rows,
        "expertmesh.queue_us": int(done.queue_s * 1e6),
        "expertmesh.compute_us": int(done.compute_s * 1e6),
    }
