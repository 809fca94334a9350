"""The router core: plan, fan out, collect, combine. A library; the gateway embeds it, RouterService
wraps it.

T tokens, D hidden size, K experts per token, R rows. A slot is one (token, k) pair.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from random import Random

import torch
from opentelemetry.trace import SpanKind

from expertmesh.router.combine import CombineMode, combine
from expertmesh.router.plan import Shipment, plan, slot_order, slots_by_expert
from expertmesh.router.policy import pick_replica
from expertmesh.router.snapshot import Key, Replica, Snapshot
from expertmesh.router.streams import Answer, ReplicaStream
from expertmesh.router.usage import ExpertUsage
from expertmesh.router.validate import check_routing
from expertmesh.runtime.errors import (
    DeadlineExceeded,
    Draining,
    ExpertMeshError,
    ExpertUnavailable,
    InternalError,
    QueueFull,
    StreamClosed,
)
from expertmesh.runtime.telemetry import Telemetry, inject
from expertmesh.runtime.tensors import from_bytes, to_bytes, wire_dtype
from expertmesh.v1 import control_pb2, expert_pb2

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 30.0
STAGE = "router"


class RouterCore:
    """Routes the rows of one model.

    Args:
        model: name the replicas' experts must belong to.
        num_experts: experts of each MoE layer of the model.
        max_message_bytes: larger shipments are refused.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        model: str,
        num_experts: Mapping[int, int],
        telemetry: Telemetry,
        *,
        max_message_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        random: Random | None = None,
    ) -> None:
        self.model = model
        self.num_experts = num_experts
        self.snapshot = Snapshot()
        self.usage = ExpertUsage(num_experts)
        self._telemetry = telemetry
        self._metrics = telemetry.metrics
        self._max_message_bytes = max_message_bytes
        self._clock = clock
        self._random = random or Random()
        self._streams: dict[tuple[str, int], ReplicaStream] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    # -- what the mesh watcher tells -------------------------------------------------------------

    def on_state(self, state: control_pb2.ReplicaState) -> None:
        """A heartbeat arrived."""
        if state.model == self.model:
            self._swap(self.snapshot.with_state(state, self._clock()))

    def on_gone(self, name: str) -> None:
        """A replica has left or its lease has run out."""
        self._swap(self.snapshot.without(name))

    def _swap(self, snapshot: Snapshot) -> None:
        if snapshot.holders is not self.snapshot.holders:
            self._changed.set()
        self.snapshot = snapshot
        for life, stream in list(self._streams.items()):
            replica = snapshot.replicas.get(life[0])
            if replica is None or replica.life != life:
                self._drop(life, stream)

    def _drop(self, life: tuple[str, int], stream: ReplicaStream) -> None:
        del self._streams[life]
        task = asyncio.get_running_loop().create_task(stream.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def wait_complete(self, timeout_s: float) -> None:
        """Until every expert of the model has a replica.

        Raises:
            ExpertUnavailable: some expert has none after `timeout_s`; names the first.
        """
        deadline_s = self._clock() + timeout_s
        while missing := self.missing():
            self._changed.clear()
            try:
                async with asyncio.timeout(deadline_s - self._clock()):
                    await self._changed.wait()
            except TimeoutError:
                layer, expert = missing[0]
                raise ExpertUnavailable(
                    f"after {timeout_s:.0f} s no replica holds layer {layer}, expert {expert} "
                    f"({len(missing)} experts have none)",
                    layer=layer,
                    expert=expert,
                ) from None

    def missing(self) -> list[Key]:
        """(layer, expert) pairs that no replica takes work for."""
        held = self.snapshot.holders
        every = ((lay, e) for lay, count in self.num_experts.items() for e in range(count))
        return [key for key in every if key not in held]

    # -- one call --------------------------------------------------------------------------------

    async def dispatch(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        experts_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        mode: CombineMode,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        callers: Sequence[str] = (),
    ) -> torch.Tensor:
        """Weighted sum over each token's experts: [T, D] in the dtype of `hidden_TD`.

        Args:
            callers: traceparents of the requests these tokens belong to, if the current span is
                not theirs. The first is the parent of the call's span, the others are linked.

        Raises:
            InvalidInput, UnknownExpert: the request is wrong.
            ExpertUnavailable: an expert has no live replica.
            QueueFull: every replica of an expert is overloaded.
            DeadlineExceeded: `timeout_s` passed.
        """
        self._metrics.calls.add(1, STAGE, "dispatch")
        with self._telemetry.span(
            "router.dispatch", parent=callers[0] if callers else "", links=callers[1:]
        ) as span:
            span.set_attribute("expertmesh.layer", layer)
            try:
                check_routing(layer, hidden_TD, experts_TK, weights_TK, self.num_experts)
                outputs_TKD = await self._outputs(layer, hidden_TD, experts_TK, mode, timeout_s)
            except ExpertMeshError as error:
                self._metrics.errors.add(1, STAGE, error.code.name)
                raise
            return combine(outputs_TKD, weights_TK, experts_TK, mode, hidden_TD.dtype)

    async def _outputs(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        experts_TK: torch.Tensor,
        mode: CombineMode,
        timeout_s: float,
    ) -> torch.Tensor:
        """[T, K, D] unweighted expert outputs."""
        experts_S: list[int] = experts_TK.reshape(-1).tolist()
        slots = slots_by_expert(experts_S, slot_order(experts_TK, mode))
        self.usage.count(layer, slots)
        self._metrics.tokens.add(hidden_TD.shape[0], STAGE)
        outputs_SD = hidden_TD.new_empty((len(experts_S), hidden_TD.shape[1]))
        await self._fill(layer, hidden_TD, experts_S, slots, outputs_SD, timeout_s)
        return outputs_SD.view(*experts_TK.shape, -1)

    async def _fill(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        experts_S: Sequence[int],
        slots: Mapping[int, Sequence[int]],
        outputs_SD: torch.Tensor,
        timeout_s: float,
    ) -> None:
        """Write every slot's expert output, asking other replicas for what some failed to give."""
        deadline_s = self._clock() + timeout_s
        top_k = len(experts_S) // max(1, hidden_TD.shape[0])
        failed: dict[str, ExpertMeshError] = {}
        while slots:
            replicas = self.snapshot.replicas  # of this round, whatever leaves meanwhile
            shipments = self._plan(layer, slots, failed)
            left_s = deadline_s - self._clock()
            calls = [
                self._ship(replicas[s.replica], layer, hidden_TD, top_k, s, outputs_SD, left_s)
                for s in shipments
            ]
            errors = [await calls[0]] if len(calls) == 1 else await asyncio.gather(*calls)
            again: list[int] = []
            for shipment, error in zip(shipments, errors, strict=True):
                if error is not None:
                    failed[shipment.replica] = error
                    again += shipment.slots_R
            slots = slots_by_expert(experts_S, again)

    def _plan(
        self, layer: int, slots: Mapping[int, Sequence[int]], failed: Mapping[str, ExpertMeshError]
    ) -> list[Shipment]:
        holders = self.snapshot.holders
        if failed:
            holders = {
                (layer, e): tuple(n for n in holders.get((layer, e), ()) if n not in failed)
                for e in slots
            }
        try:
            return plan(layer, slots, holders, self._choose)
        except ExpertUnavailable as error:
            overload = next((e for e in failed.values() if isinstance(e, QueueFull)), None)
            raise overload or error from next(iter(failed.values()), None)

    def _choose(self, able: Sequence[str], contacted: Mapping[str, object]) -> str:
        return pick_replica(able, contacted, self._backlog_rows, self._random)

    def _backlog_rows(self, name: str) -> int:
        replica = self.snapshot.replicas[name]
        stream = self._streams.get(replica.life)
        return replica.load.queued_rows + (stream.in_flight_rows if stream else 0)

    async def _ship(
        self,
        replica: Replica,
        layer: int,
        hidden_TD: torch.Tensor,
        top_k: int,
        shipment: Shipment,
        outputs_SD: torch.Tensor,
        timeout_s: float,
    ) -> ExpertMeshError | None:
        """Send one shipment and store its rows. Returns an error that another replica can mend."""
        if timeout_s <= 0:
            raise DeadlineExceeded(f"layer {layer}: no time left to ask {shipment.replica}")
        slots_R = torch.tensor(shipment.slots_R)
        rows_RD = hidden_TD.index_select(0, slots_R // top_k)
        request = expert_pb2.ComputeRequest(
            model=self.model,
            layer=layer,
            experts=shipment.experts,
            rows_per_expert=shipment.rows_per_expert,
            dtype=wire_dtype(rows_RD.dtype, "hidden.dtype"),
            hidden_size=rows_RD.shape[1],
        )
        try:
            response, payload = await self._send(replica, request, rows_RD, timeout_s)
        except (StreamClosed, Draining) as error:
            self._swap(self.snapshot.without_work_for(replica.life, error.message))
            return error
        except QueueFull as error:
            return error
        self._swap(self.snapshot.with_load(replica.life, response.load, self._clock()))
        outputs_SD[slots_R] = _rows_of(response, payload, rows_RD, shipment)
        return None

    async def _send(
        self,
        replica: Replica,
        request: expert_pb2.ComputeRequest,
        rows_RD: torch.Tensor,
        timeout_s: float,
    ) -> Answer:
        group, num_rows = replica.state.group, rows_RD.shape[0]
        with self._telemetry.span("router.send", kind=SpanKind.CLIENT) as span:
            if self._telemetry.enabled:
                span.set_attributes(
                    {"expertmesh.replica": replica.name, "expertmesh.rows": num_rows}
                )
                request.traceparent = inject()
            started_s = self._clock()
            stream = self._stream(replica)
            response, payload = await stream.compute(
                request, to_bytes(rows_RD), num_rows, timeout_s
            )
        away_s = (response.queue_us + response.compute_us) / 1e6
        self._metrics.transport_time.record(self._clock() - started_s - away_s, group)
        self._metrics.rows.add(num_rows, STAGE, group)
        return response, payload

    def _stream(self, replica: Replica) -> ReplicaStream:
        stream = self._streams.get(replica.life)
        if stream is not None and stream.closed:
            self._drop(replica.life, stream)
            stream = None
        if stream is None:
            stream = ReplicaStream(replica.state.address, self._max_message_bytes)
            self._streams[replica.life] = stream
        return stream

    def in_flight_rows(self, life: tuple[str, int]) -> int:
        """Rows sent to a replica and not yet answered."""
        stream = self._streams.get(life)
        return stream.in_flight_rows if stream else 0

    async def close(self) -> None:
        """End all streams."""
        for life, stream in list(self._streams.items()):
            self._drop(life, stream)
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
