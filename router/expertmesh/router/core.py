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

from expertmesh.router.combine import CombineMode, combine
from expertmesh.router.plan import Shipment, plan, slot_order, slots_by_expert
from expertmesh.router.policy import pick_replica
from expertmesh.router.shipping import STAGE, CallRows, Shipper
from expertmesh.router.snapshot import Key, Life, Replica, Snapshot
from expertmesh.router.usage import ExpertUsage
from expertmesh.router.validate import check_routing
from expertmesh.runtime.errors import (
    Draining,
    ExpertMeshError,
    ExpertUnavailable,
    QueueFull,
    StreamClosed,
)
from expertmesh.runtime.telemetry import Telemetry
from expertmesh.v1 import control_pb2

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 30.0


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
        self._clock = clock
        self._random = random or Random()
        self._shipper = Shipper(model, telemetry, max_message_bytes, clock)
        self._changed = asyncio.Event()

    # -- what the mesh watcher tells -------------------------------------------------------------

    def on_state(self, state: control_pb2.ReplicaState) -> None:
        """A heartbeat arrived."""
        if state.model == self.model:
            self._swap(self.snapshot.with_state(state, self._clock()))
            self._forget_the_gone()

    def on_gone(self, name: str) -> None:
        """A replica has left or its lease has run out."""
        self._swap(self.snapshot.without(name))
        self._forget_the_gone()

    def _forget_the_gone(self) -> None:
        self._shipper.keep_only(replica.life for replica in self.snapshot.replicas.values())

    def _swap(self, snapshot: Snapshot) -> None:
        if snapshot.holders is not self.snapshot.holders:
            self._changed.set()
        self.snapshot = snapshot

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
            shipments = self._plan(layer, slots, failed)
            call = CallRows.gather(layer, hidden_TD, top_k, shipments)
            again = await self._ship(call, shipments, failed, deadline_s - self._clock())
            outputs_SD.index_copy_(0, call.slots_S, call.outputs_SD)  # failed ones: another round
            slots = slots_by_expert(experts_S, again) if again else {}

    async def _ship(
        self,
        call: CallRows,
        shipments: Sequence[Shipment],
        failed: dict[str, ExpertMeshError],
        timeout_s: float,
    ) -> list[int]:
        """Send a round of shipments. Returns the slots that other replicas must be asked for."""
        replicas = [self.snapshot.replicas[shipment.replica] for shipment in shipments]
        parcels = list(call.parcels(shipments, replicas))
        answers = await self._shipper.ship(call, parcels, timeout_s)
        loads: list[tuple[Life, control_pb2.ReplicaLoad]] = []
        again: list[int] = []
        for parcel, answer in zip(parcels, answers, strict=True):
            if error := answer.exception():
                failed[parcel.replica.name] = self._mendable(parcel.replica, error)
                again += parcel.shipment.slots_R
            else:
                loads.append((parcel.replica.life, answer.result()[0].load))
        self._swap(self.snapshot.with_loads(loads, self._clock()))
        return again

    def _mendable(self, replica: Replica, error: BaseException) -> ExpertMeshError:
        """The error if another replica can mend it; raises it otherwise."""
        if isinstance(error, StreamClosed | Draining):
            self._swap(self.snapshot.without_work_for(replica.life, error.message))
        elif not isinstance(error, QueueFull):
            raise error
        return error

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
        return replica.load.queued_rows + self._shipper.in_flight_rows(replica.life)

    def in_flight_rows(self, life: Life) -> int:
        """Rows sent to a replica and not yet answered."""
        return self._shipper.in_flight_rows(life)

    async def close(self) -> None:
        """End all streams."""
        await self._shipper.close()
