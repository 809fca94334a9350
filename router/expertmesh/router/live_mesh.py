"""The mesh as one router sees it: who is there, who is unfit for work, who gets the next rows."""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from random import Random

from expertmesh.router.calls import Load
from expertmesh.router.expert_costs import ExpertCosts, expert_costs
from expertmesh.router.heartbeat import why_unusable
from expertmesh.router.missing import OF_THE_LIVING, cause_of, expert_unavailable, why_missing
from expertmesh.router.plan import Shipment, plan
from expertmesh.router.pools import Standing
from expertmesh.router.probes import Prober
from expertmesh.router.shipping import Shipper
from expertmesh.router.snapshot import Key, Life, Replica, Snapshot, Until
from expertmesh.router.standing import standing_of
from expertmesh.router.waterfill import Shares, share_out
from expertmesh.runtime.errors import (
    CorruptAnswer,
    Draining,
    ExpertMeshError,
    ExpertUnavailable,
    StreamClosed,
    UnknownExpert,
    UnknownModel,
)
from expertmesh.v1 import control_pb2

logger = logging.getLogger(__name__)

_ASIDE_UNTIL: Mapping[type[ExpertMeshError], Until] = {
    Draining: "heartbeat",
    StreamClosed: "probe",
    CorruptAnswer: "probe",
    UnknownExpert: "claims",
    UnknownModel: "claims",
}
"""Failures after which a replica gets no work, and what brings it back."""


class LiveMesh:
    """The newest snapshot of the replicas of one model, and what changes it.

    Args:
        model: name the replicas' experts must belong to.
        num_experts: experts of each MoE layer of the model.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        model: str,
        num_experts: Mapping[int, int],
        shipper: Shipper,
        clock: Callable[[], float],
        random: Random,
    ) -> None:
        self.model = model
        self.num_experts = num_experts
        self.snapshot = Snapshot()
        self._shipper = shipper
        self._clock = clock
        self._random = random
        self._metrics = shipper.telemetry.metrics
        self._prober = Prober(shipper, self._living, self._on_probe_answer, random)
        self._changed = asyncio.Event()

    # -- what the mesh watcher tells -------------------------------------------------------------

    def on_state(self, state: control_pb2.ReplicaState) -> None:
        """A heartbeat arrived."""
        if state.model == self.model and state.replica:
            own_rows = self.in_flight_rows((state.replica, state.incarnation))
            wrong = why_unusable(state, self.num_experts)
            self._swap(self.snapshot.with_state(state, self._clock(), own_rows, wrong))
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
                layer = missing[0][0]
                own = [expert for other, expert in missing if other == layer]
                cause = f"{cause_of(layer, own[0], self.snapshot, {})}, after {timeout_s:.0f} s"
                raise expert_unavailable(self.model, layer, own, cause) from None

    def missing(self) -> list[Key]:
        """(layer, expert) pairs that no replica takes work for."""
        held = self.snapshot.holders
        every = ((lay, e) for lay, count in self.num_experts.items() for e in range(count))
        return [key for key in every if key not in held]

    # -- what a call asks and tells (calls.Mesh) ------------------------------------------------

    def replica(self, name: str) -> Replica:
        """As it is in the newest snapshot."""
        return self.snapshot.replicas[name]

    def _living(self, life: Life) -> Replica | None:
        replica = self.snapshot.replicas.get(life[0])
        return replica if replica and replica.life == life else None

    def copies(self, layer: int, shipment: Shipment) -> Sequence[Replica]:
        """Who takes work for the first of its experts; empty if nobody else does."""
        names = self.snapshot.holders.get((layer, shipment.experts[0]), ())
        return [self.snapshot.replicas[name] for name in names] if len(names) > 1 else ()

    def takes_work(self, life: Life) -> bool:
        """Whether it is there and not set aside."""
        replica = self._living(life)
        return replica is not None and replica.takes_work

    def on_loads(self, loads: Sequence[Load]) -> None:
        """Answers told how busy their replicas are."""
        self._swap(self.snapshot.with_loads(loads, self._clock()))

    def on_failure(self, replica: Replica, error: ExpertMeshError) -> bool:
        """A replica failed a call. Raises the error if others would fail it, too. Returns whether
        the replica itself may be asked again."""
        if isinstance(error, UnknownExpert) and self._holds_others_now(replica):
            return True
        until = _ASIDE_UNTIL.get(type(error))
        if until is not None:
            self._set_aside(replica, error.message, until)
        elif not isinstance(error, OF_THE_LIVING):
            raise error
        return False

    def _holds_others_now(self, replica: Replica) -> bool:
        """Whether the replica has told meanwhile that it holds other experts than when it was
        asked. What it still holds it can be asked for again."""
        now = self._living(replica.life)
        return now is not None and now.state.holds_version != replica.state.holds_version

    def on_silence(self, replica: Replica) -> None:
        """A replica does not answer. It stays where others cannot take its place."""
        if self.takes_work(replica.life) and self.snapshot.is_spare(replica.name):
            reason = f"it is silent at {replica.state.address}"
            self._set_aside(replica, reason, "probe")

    def _set_aside(self, replica: Replica, reason: str, until: Until) -> None:
        if not self.takes_work(replica.life):
            return
        if until == "claims":
            reason = f"it has not what it claims to have: {reason}"
        log = logger.info if until == "heartbeat" else logger.warning
        log("replica %s is set aside: %s", replica.name, reason)
        self._metrics.set_asides.add(1, replica.state.group)
        self._swap(self.snapshot.without_work_for(replica.life, reason, until))
        if until == "probe":
            self._prober.watch(replica.life)

    def _on_probe_answer(self, life: Life) -> None:
        replica = self._living(life)
        if replica is not None:
            self._shipper.renew(life)
            self._swap(self.snapshot.with_probed(life))

    def plan(
        self,
        layer: int,
        slots: Mapping[int, Sequence[int]],
        failed: Mapping[str, ExpertMeshError],
        excluded: Collection[str],
    ) -> list[Shipment]:
        """Who is to be asked for the slots; ExpertUnavailable, or why the last holder failed."""
        holders = self.snapshot.holders
        if failed or excluded:
            holders = {
                (layer, e): tuple(
                    n for n in holders.get((layer, e), ()) if n not in failed and n not in excluded
                )
                for e in slots
            }
        try:
            return plan(layer, slots, holders, partial(self._share, layer))
        except ExpertUnavailable:
            missing = [expert for expert in slots if not holders.get((layer, expert))]
            raise why_missing(self.model, layer, missing, self.snapshot, failed) from None

    def _share(
        self, layer: int, rows: Mapping[int, int], holders: Mapping[int, Sequence[str]]
    ) -> Shares:
        now_s = self._clock()
        return share_out(
            rows, holders, lambda name: self.standing(name, layer, now_s), self._random
        )

    def now_s(self) -> float:
        """By the core's clock."""
        return self._clock()

    def standing(self, name: str, layer: int, now_s: float) -> Standing:
        """How a replica stands for a call to a layer."""
        replica = self.snapshot.replicas[name]
        own_rows, transport_us = self._shipper.under_way(replica.life)
        return standing_of(replica, layer, own_rows, transport_us, now_s - replica.heard_s)

    def expert_costs(self, layer: int) -> ExpertCosts:
        """What a row through each expert of a layer would cost now."""
        now_s, holders, replicas = self._clock(), self.snapshot.holders, self.snapshot.replicas
        able = [holders.get((layer, own), ()) for own in range(self.num_experts[layer])]
        names = set().union(*able)
        standings = {name: self.standing(name, layer, now_s) for name in names}
        return expert_costs(able, standings, {name: replicas[name].state.group for name in names})

    def in_flight_rows(self, life: Life) -> int:
        """Rows sent to a replica and not yet answered."""
        return self._shipper.in_flight_rows(life)

    async def close(self) -> None:
        """End all streams."""
        await self._prober.close()
        await self._shipper.close()
