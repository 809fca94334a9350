"""One layer call under way: sends its shipments, and asks others for what is lost or late.

Each shipment is a leg. A leg that fails is replaced at once by stand-ins, which go to other holders
of its experts; so is a leg of a silent replica. A leg that is late gets stand-ins within a budget
(a hedge), and whoever is first is taken: rows are filed, never added up, so an answer that comes
twice changes nothing.

T tokens, D hidden size, K experts per token, S slots (T * K), R rows.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence

from expertmesh.router.calls import LayerCall, Load, Mesh
from expertmesh.router.legs import Batch, Leg
from expertmesh.router.plan import Shipment, slots_by_expert
from expertmesh.router.rows import call_rows
from expertmesh.router.shipping import Shipper
from expertmesh.router.streams import Answer
from expertmesh.runtime.errors import CorruptAnswer, DeadlineExceeded, ExpertMeshError
from expertmesh.v1 import expert_pb2

RECHECK_S = 0.025
"""Between looks at a leg that is late and could not be hedged."""
_BLOCKED_S = 0.05
"""A timer that comes so much too late says that this process stood still, not the replicas."""


class Fanout:
    """Runs one call; `run` may be awaited once."""

    def __init__(self, call: LayerCall, shipper: Shipper, mesh: Mesh) -> None:
        self._call = call
        self._shipper = shipper
        self._mesh = mesh
        self._loop = asyncio.get_running_loop()
        self._complete: asyncio.Future[None] = self._loop.create_future()
        self._roots: list[Leg] = []
        self._num_open = 0
        """Roots that are not done."""
        self._batches: list[Batch] = []
        self._failed: dict[str, ExpertMeshError] = {}
        self._loads: list[Load] = []
        self._deadline_s = 0.0
        self._wake_s = 0.0
        self._common = call.request_fields(shipper.model)
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, slots: Mapping[int, Sequence[int]], timeout_s: float) -> None:
        """Write the output of every slot.

        Args:
            slots: of each expert; what `slots_by_expert` returns.

        Raises:
            ExpertMeshError: as `RouterCore.dispatch`.
        """
        if not slots:
            return
        self._deadline_s = self._shipper.clock() + timeout_s
        if timeout_s <= 0:
            raise DeadlineExceeded(f"layer {self._call.layer}: no time left to ask its experts")
        try:
            shipments = self._planned(slots, ())
            self._num_open = len(shipments)
            self._shipper.budget.earn(len(shipments))
            self._send(shipments, None)
            await self._complete
            for batch in self._batches:
                batch.rows.finish(batch.filed)
        finally:
            self._end()

    def _end(self) -> None:
        if self._timer:
            self._timer.cancel()
        for root in self._roots:
            root.abandon(self._shipper)
        if self._loads:  # once the caller has its rows
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Tell the mesh the loads that have come with answers."""
        if self._loads:
            loads, self._loads = self._loads, []
            self._mesh.on_loads(loads)

    # -- legs ------------------------------------------------------------------------------------

    def _send(self, shipments: Sequence[Shipment], parent: Leg | None, hedge: bool = False) -> None:
        call = self._call
        rows = call_rows(call.hidden_TD, call.top_k, shipments, call.outputs_SD)
        batch = Batch(rows, call.origin, self._shipper.telemetry.is_recording())
        self._batches.append(batch)
        legs = [
            Leg(own, self._mesh.replica(own.replica), batch, index, parent, hedge, len(own.slots_R))
            for index, own in enumerate(shipments)
        ]
        siblings = self._roots if parent is None else parent.children
        siblings.extend(legs)
        timeout_s = self._deadline_s - self._shipper.clock()
        for leg in legs:
            if self._complete.done():
                return
            shipment = leg.shipment
            request = expert_pb2.ComputeRequest(
                experts=shipment.experts, rows_per_expert=shipment.rows_per_expert, **self._common
            )
            copies = self._mesh.copies(call.layer, shipment)
            try:
                leg.send(self._shipper, request, timeout_s, self._on_answer, copies)
            except ExpertMeshError as error:
                self._failed_leg(leg, error)
        self._arm()

    def _on_answer(self, leg: Leg, answer: Answer | ExpertMeshError) -> None:
        try:
            if isinstance(answer, ExpertMeshError):
                leg.landed(self._shipper, answer)
                self._failed_leg(leg, answer)
            else:
                self._answered(leg, answer)
        except Exception as error:  # a bug must not leave the call waiting for its deadline
            self._fail(error)

    def _answered(self, leg: Leg, answer: Answer) -> None:
        try:
            leg.file(answer, self._call.form)
        except CorruptAnswer as error:
            leg.landed(self._shipper, error)
            self._failed_leg(leg, error)
            return
        leg.landed(self._shipper)
        leg.observe(self._shipper, answer[0])
        life = leg.replica.life
        self._loads.append((life, answer[0].load, self._shipper.in_flight_rows(life)))
        self._done(leg)

    def _done(self, leg: Leg) -> None:
        """The rows of a leg are there."""
        leg.is_done = True
        if leg.is_waiting:
            leg.outrun(self._shipper)
        if leg.is_waiting or leg.children:
            leg.abandon(self._shipper)
        parent = leg.parent
        if leg.is_hedge:
            self._shipper.telemetry.metrics.hedges_won.add(1, leg.replica.state.group)
        if parent is None:
            self._num_open -= 1
            if not self._num_open and not self._complete.done():
                self._complete.set_result(None)
        elif not parent.is_done and all(child.is_done for child in parent.children):
            self._done(parent)

    # -- what goes wrong -------------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        if not self._complete.done():
            self._complete.set_exception(error)

    def _failed_leg(self, leg: Leg, error: ExpertMeshError) -> None:
        """Its replica did not give the rows: ask others, unless they have been asked already."""
        if self._complete.done():
            return
        try:
            if not self._mesh.on_failure(leg.replica, error):
                self._failed[leg.replica.name] = error
        except ExpertMeshError as fatal:
            self._fail(fatal)
            return
        if leg.is_done or leg.children:
            return
        try:
            self._stand_in(leg, ())
        except ExpertMeshError as hopeless:
            self._give_up(leg, hopeless)

    def _stand_in(self, leg: Leg, excluded: Collection[str]) -> None:
        """Ask others for the leg's rows."""
        self._shipper.telemetry.metrics.retries.add(1, leg.replica.state.group)
        self._send(self._planned_for(leg, excluded), leg)

    def _planned_for(self, leg: Leg, excluded: Collection[str]) -> list[Shipment]:
        self._flush()
        slots = slots_by_expert(self._call.experts_S, leg.shipment.slots_R)
        return self._planned(slots, excluded)

    def _planned(
        self, slots: Mapping[int, Sequence[int]], excluded: Collection[str]
    ) -> list[Shipment]:
        """Who is asked for the slots; replicas that could not answer in time have failed."""
        while True:
            shipments = self._mesh.plan(self._call.layer, slots, self._failed, excluded)
            replicas = [self._mesh.replica(own.replica) for own in shipments]
            origin, deadline_s = self._call.origin, self._deadline_s
            late = self._shipper.too_late(shipments, replicas, origin, deadline_s)
            if not late:
                return shipments
            self._failed |= late

    def _give_up(self, leg: Leg, error: ExpertMeshError) -> None:
        """Nobody is left to ask: its rows can only come from the leg it stands in for."""
        parent = leg.parent
        if parent is None:
            self._fail(error)
            return
        for sibling in parent.children:
            sibling.abandon(self._shipper)
        parent.children.clear()
        if parent.is_waiting:
            parent.due_s = self._shipper.clock() + RECHECK_S
            self._arm()
        else:
            self._give_up(parent, error)

    # -- time ------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Wake up when the next leg is late, or the time is over."""
        if self._complete.done():
            return
        wake_s = self._deadline_s
        for leg in self._waiting():
            wake_s = min(wake_s, leg.due_s)
        if self._timer is not None:
            if wake_s == self._wake_s:
                return
            self._timer.cancel()
        self._wake_s = wake_s
        self._timer = self._loop.call_later(max(0.0, wake_s - self._shipper.clock()), self._tick)

    def _waiting(self) -> list[Leg]:
        """Legs that are under way and have no stand-ins."""
        found: list[Leg] = []
        for root in self._roots:
            if root.children:
                found += [leg for leg in root.all() if leg.is_waiting and not leg.children]
            elif root.is_waiting:
                found.append(root)
        return found

    def _tick(self) -> None:
        self._timer = None
        if self._complete.done():
            return
        now_s = self._shipper.clock()
        if now_s >= self._deadline_s:
            self._expire()
            return
        was_blocked = now_s - self._wake_s > _BLOCKED_S
        try:
            for leg in self._waiting():
                if leg.due_s <= now_s:
                    leg.due_s = now_s + RECHECK_S
                    if not was_blocked:  # answers may be there and not read yet
                        self._late(leg)
        except Exception as error:
            self._fail(error)
        self._arm()

    def _expire(self) -> None:
        silent = next(iter(self._waiting()), None) or self._roots[0]
        address = silent.replica.state.address
        self._fail(
            DeadlineExceeded(
                f"layer {self._call.layer}: replica at {address} did not answer in time",
                address=address,
                layer=self._call.layer,
            )
        )

    def _late(self, leg: Leg) -> None:
        """A leg has taken longer than such legs do."""
        mesh, shipper = self._mesh, self._shipper
        if shipper.is_silent(leg.replica):
            mesh.on_silence(leg.replica)
        try:
            if mesh.takes_work(leg.replica.life):
                self._hedge(leg)
            else:
                self._stand_in(leg, leg.asked())
        except ExpertMeshError:
            return  # nobody else can be asked: wait for it

    def _hedge(self, leg: Leg) -> None:
        """Ask others as well, if they are not late themselves and the budget has it."""
        shipments = self._planned_for(leg, leg.asked())
        if any(self._shipper.is_late(self._mesh.replica(own.replica)) for own in shipments):
            return
        if self._shipper.budget.spend(len(shipments)):
            self._shipper.telemetry.metrics.hedges.add(len(shipments), leg.replica.state.group)
            self._send(shipments, leg, hedge=True)
