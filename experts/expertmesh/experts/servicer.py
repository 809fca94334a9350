"""ExpertService: decode, admit, batch, encode. Bytes in, bytes out; protobuf sees only headers."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import grpc
from opentelemetry.trace import Span, SpanKind

from expertmesh.experts.admission import Holding, RowMemory, admit
from expertmesh.experts.answering import Answering, Reply
from expertmesh.experts.batch import Computed
from expertmesh.experts.batcher import MicroBatcher
from expertmesh.experts.outbox import Outbox
from expertmesh.runtime import wire
from expertmesh.runtime.errors import DeadlineExceeded, ExpertMeshError, MalformedMessage
from expertmesh.runtime.origin import MAX_CALLER_CHARS, Origin, priority_of
from expertmesh.runtime.server import status_of
from expertmesh.runtime.telemetry import Telemetry
from expertmesh.runtime.tensors import to_bytes
from expertmesh.runtime.trace_context import NO_SPAN, inject
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
        self.rows: Counter[tuple[int, int]] = Counter()
        """Rows computed of each (layer, expert)."""
        self._batcher = batcher
        self._holding = holding
        self._describe = describe
        self._load = load
        self._telemetry = telemetry
        metrics = self._metrics = telemetry.metrics
        self._calls = metrics.calls.share(STAGE, "Compute")
        self._rows = metrics.rows.share(STAGE, group)
        self._in_flight_rows = metrics.in_flight_rows.share(STAGE, group)
        self._queue_wait = metrics.queue_wait.share(STAGE, group)
        self._memory = RowMemory()

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
        try:
            return wire.encode(*await self._computed(header, payload, remaining_s))
        except ExpertMeshError as error:
            self._count(error)
            raise

    async def compute_stream(self, requests: Any, context: Any) -> None:
        """Requests as they come, each answered when its batch is done."""
        outbox = Outbox(context)
        broken: MalformedMessage | None = None

        async def send_later(header: expert_pb2.ComputeRequest, payload: memoryview) -> None:
            await outbox.send(wire.encode(*await self.answer(header, payload)))

        def send_soon(reply: Reply) -> None:
            sending = outbox.send(wire.encode(*reply))
            try:
                answers.create_task(sending)
            except RuntimeError:  # the stream has ended
                sending.close()

        answering = Answering(send_soon)
        try:
            async with asyncio.TaskGroup() as answers:
                while (data := await outbox.read()) is not grpc.aio.EOF:
                    try:
                        header, payload = wire.decode(expert_pb2.ComputeRequest, data)
                    except MalformedMessage as error:  # has no id to answer to: it ends the stream
                        broken = error
                        break
                    if header.cancels and answering.cancel(header):
                        continue
                    if reply := self.answer_at_once(header, payload):
                        await outbox.send(wire.encode(*reply))
                    else:
                        answering.add(header.id, answers.create_task(send_later(header, payload)))
        except* grpc.aio.BaseError as gone:
            logger.debug("a caller left before its answers: %s", gone.exceptions[0])
        if broken:  # what came before it has been answered
            raise broken

    def answer_at_once(
        self, header: expert_pb2.ComputeRequest, payload: memoryview
    ) -> Reply | None:
        """The answer, if there are few rows and nobody waits; else None: `answer` gives it."""
        batcher = self._batcher
        if not batcher.computes_at_once(sum(header.rows_per_expert)):
            return None
        if not batcher.is_ready(header.layer, header.experts):
            return None
        try:
            with self._span(header) as span:
                rows = admit(header, payload, self._holding, self._memory.rows)
                done = batcher.compute_now(rows)
                self._trace(span, header, done)
            return self._reply(header, done)
        except Exception as error:
            return self._failure(header, error)

    async def answer(self, header: expert_pb2.ComputeRequest, payload: memoryview) -> Reply:
        """The answer when its batch is done; an error is one, too."""
        try:
            return await self._computed(header, payload, None)
        except Exception as error:
            return self._failure(header, error)

    async def _computed(
        self, header: expert_pb2.ComputeRequest, payload: memoryview, remaining_s: float | None
    ) -> Reply:
        timeout_s = header.timeout_ms / 1e3 if header.timeout_ms else remaining_s
        with self._span(header) as span:
            done = await self._batched(header, payload, timeout_s)
            self._trace(span, header, done)
        return self._reply(header, done)

    async def _batched(
        self, header: expert_pb2.ComputeRequest, payload: memoryview, timeout_s: float | None
    ) -> Computed:
        rows = admit(header, payload, self._holding)
        origin = Origin(header.caller[:MAX_CALLER_CHARS], priority_of(header.priority))
        self._in_flight_rows.value += rows.num_rows
        try:
            async with asyncio.timeout(timeout_s):
                return await self._batcher.submit(rows, timeout_s, origin=origin)
        except TimeoutError as error:
            message = f"layer {header.layer}: not computed within {timeout_s:.3f} s"
            raise DeadlineExceeded(message, layer=header.layer) from error
        finally:
            self._in_flight_rows.value -= rows.num_rows

    def _span(self, header: expert_pb2.ComputeRequest) -> AbstractContextManager[Span]:
        if not header.traceparent:  # traces begin with who calls
            return NO_SPAN
        return self._telemetry.span(
            "expert.compute", parent=header.traceparent, kind=SpanKind.SERVER
        )

    def _count(self, error: Exception | None = None) -> None:
        self._calls.value += 1
        if isinstance(error, ExpertMeshError):
            self._metrics.errors.add(1, STAGE, error.code.name)

    def _trace(self, span: Span, header: expert_pb2.ComputeRequest, done: Computed) -> None:
        if span.is_recording():
            span.set_attributes(_attributes(header, done))
            self._record_stages(done)

    def _record_stages(self, done: Computed) -> None:
        """The queue and the batch as spans of the caller's own trace."""
        end_ns = time.time_ns()
        start_ns = end_ns - int(done.compute_s * 1e9)
        queued_ns = start_ns - int(done.queue_s * 1e9)
        here = inject()
        self._telemetry.record("expert.queue", queued_ns, start_ns, parent=here)
        batch = {"expertmesh.batch_rows": done.batch_rows}
        self._telemetry.record("expert.batch", start_ns, end_ns, batch, parent=here)

    def _reply(self, header: expert_pb2.ComputeRequest, done: Computed) -> Reply:
        self._count()
        for expert, count in zip(header.experts, header.rows_per_expert, strict=True):
            self.rows[header.layer, expert] += count
        self._rows.value += done.rows_RD.shape[0]
        self._queue_wait.add(done.queue_s)
        response = expert_pb2.ComputeResponse(
            id=header.id,
            dtype=header.dtype,
            hidden_size=header.hidden_size,
            load=self._load(),
            queue_us=int(done.queue_s * 1e6),
            compute_us=int(done.compute_s * 1e6),
        )
        return response, to_bytes(done.rows_RD)

    def _failure(self, header: expert_pb2.ComputeRequest, error: Exception) -> Reply:
        self._count(error)
        failure = expert_pb2.ComputeResponse(
            id=header.id, error=status_of(error), load=self._load()
        )
        return failure, memoryview(b"")


def _attributes(header: expert_pb2.ComputeRequest, done: Computed) -> dict[str, Any]:
    return {
        "expertmesh.layer": header.layer,
        "expertmesh.experts": len(header.experts),
        "expertmesh.rows": done.rows_RD.shape[0],
        "expertmesh.batch_rows": done.batch_rows,
        "expertmesh.queue_us": int(done.queue_s * 1e6),
        "expertmesh.compute_us": int(done.compute_s * 1e6),
    }
