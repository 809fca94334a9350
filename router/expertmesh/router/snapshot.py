"""The mesh as a router last saw it: immutable, swapped whole, versioned. Time is passed in."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, Self

from expertmesh.router.pools import Costs
from expertmesh.v1 import control_pb2, tensor_pb2

Key = tuple[int, int]
"""(layer, expert)"""
Life = tuple[str, int]
"""(replica id, incarnation): names one process, not its successor"""
Resident = Mapping[int, frozenset[int]]
"""layer -> experts"""

Until = Literal["heartbeat", "probe", "claims"]
"""What brings back a replica that was set aside: its next heartbeat, an answer to a probe, or a
heartbeat that claims to hold something else. A new life of it always starts afresh."""

UNKNOWN_ROW_US = 100.0
"""Of a replica that has not computed anything yet."""
_LEAST_ROW_US = 0.01
_DRIFTED = 2.0
"""Real over fitted time from which on it is no more what is done between batches."""

_NO_REPLICAS: Mapping[str, "Replica"] = MappingProxyType({})
_NO_HOLDERS: Mapping[Key, tuple[str, ...]] = MappingProxyType({})


@dataclass(slots=True)
class Replica:
    """One replica as its newest heartbeat or answer described it. Never changed once it is made.

    Every answer makes a new one: so it is not a frozen dataclass with cached properties, which
    takes three times as long to make (2.4 us, now 0.7).
    """

    life: Life
    """Which process it is."""
    state: control_pb2.ReplicaState
    load: control_pb2.ReplicaLoad
    """Of the newest heartbeat or answer, whichever came last."""
    heard_s: float
    """When this router heard it, by this router's clock."""
    set_aside: str = ""
    """Why it gets no work now; "" when it does."""
    aside_until: Until = "heartbeat"
    """What brings it back."""
    others_rows: int = 0
    """Rows of other routers in its queue when it was heard."""
    _costs: Costs | None = field(default=None, init=False, compare=False)
    _resident: Resident | None = field(default=None, init=False, compare=False)

    @property
    def name(self) -> str:
        """Its id, unique in the mesh."""
        return self.life[0]

    @property
    def takes_work(self) -> bool:
        """Whether rows may be sent to it."""
        return not self.set_aside and self.state.status == control_pb2.REPLICA_STATUS_READY

    @property
    def resident(self) -> Resident | None:
        """layer -> experts whose weights are on its device; None: all it holds."""
        if not self.load.resident_bits:
            return None
        if self._resident is None:
            self._resident = self._read_resident()
        return self._resident

    def _read_resident(self) -> Resident:
        bits = int.from_bytes(self.load.resident_bits, "little")
        found, place = {}, 0
        for held in self.state.holds:
            found[held.layer] = frozenset(
                expert for own, expert in enumerate(held.experts, place) if bits >> own & 1
            )
            place += len(held.experts)
        return found

    @property
    def has_drifted(self) -> bool:
        """Whether its device has become so much slower than the fit of its costs knows yet."""
        return self.load.drift > _DRIFTED

    @property
    def costs(self) -> Costs:
        """What a call costs there, as far as the replica knows itself."""
        if self._costs is None:
            self._costs = self._read_costs()
        return self._costs

    def _read_costs(self) -> Costs:
        load = self.load
        load_us = self.state.residency.load_time_us if load.resident_bits else 0.0
        drift = load.drift if self.has_drifted else 1.0
        batch_us, expert_us = load.batch_time_us * drift, load.expert_time_us * drift
        row_us = load.row_cost_us * drift
        if batch_us + expert_us + row_us > 0:
            return Costs(batch_us, expert_us, max(row_us, _LEAST_ROW_US), load_us)
        return Costs(0.0, 0.0, load.row_time_us or UNKNOWN_ROW_US, load_us)

    @property
    def may_split(self) -> bool:
        """Whether it may get some of an expert's rows while another replica gets the others.

        In float32 the bits of a product depend on how many rows it has: there experts stay whole,
        so that a lone caller gets the bits that transformers gives.
        """
        return not self.state.deterministic and self.state.dtype != tensor_pb2.DTYPE_FLOAT32

    def resident_in(self, layer: int) -> frozenset[int] | None:
        """Experts of the layer whose weights are on its device; None: all it holds."""
        resident = self.resident
        return None if resident is None else resident.get(layer, frozenset())


def _is_newer(new: control_pb2.ReplicaState, old: control_pb2.ReplicaState) -> bool:
    return (new.incarnation, new.sequence) > (old.incarnation, old.sequence)


def _stays_aside(old: Replica, new: control_pb2.ReplicaState) -> bool:
    if not old.set_aside or old.aside_until == "heartbeat":
        return False
    return old.aside_until == "probe" or old.state.holds == new.holds


def _holders(replicas: Mapping[str, Replica]) -> Mapping[Key, tuple[str, ...]]:
    found: dict[Key, list[str]] = {}
    for name, replica in sorted(replicas.items()):
        if replica.takes_work:
            for held in replica.state.holds:
                for expert in held.experts:
                    found.setdefault((held.layer, expert), []).append(name)
    return MappingProxyType({key: tuple(names) for key, names in found.items()})


@dataclass(frozen=True)
class Snapshot:
    """Replicas by id, and who can compute which expert."""

    version: int = 0
    replicas: Mapping[str, Replica] = field(default_factory=lambda: _NO_REPLICAS)
    holders: Mapping[Key, tuple[str, ...]] = field(default_factory=lambda: _NO_HOLDERS)
    """(layer, expert) -> ids of the replicas that take work for it, sorted."""

    def with_state(
        self,
        state: control_pb2.ReplicaState,
        now_s: float,
        own_rows: int = 0,
        set_aside: str = "",
    ) -> Self:
        """After a heartbeat. Older or repeated ones change nothing.

        A replica that was set aside comes back if that is what it was waiting for. If an answer has
        overtaken the heartbeat, the load of the answer stays: it counts more rows as done.

        Args:
            own_rows: rows this router has sent it and not got back.
            set_aside: what is wrong with this heartbeat, or "".
        """
        old = self.replicas.get(state.replica)
        if old and not _is_newer(state, old.state):
            return self
        fresh = Replica(
            (state.replica, state.incarnation),
            state,
            state.load,
            now_s,
            set_aside,
            others_rows=max(0, state.load.queued_rows - own_rows),
        )
        if old and old.life == fresh.life and old.load.done_rows > state.load.done_rows:
            fresh = replace(fresh, load=old.load, heard_s=old.heard_s, others_rows=old.others_rows)
        if old and old.life == fresh.life and _stays_aside(old, state):
            fresh = replace(fresh, set_aside=old.set_aside, aside_until=old.aside_until)
        same_work = old is not None and (
            old.takes_work == fresh.takes_work and old.state.holds == state.holds
        )
        return self._with(fresh, keep_holders=same_work)

    def with_loads(
        self, loads: Iterable[tuple[Life, control_pb2.ReplicaLoad, int]], now_s: float
    ) -> Self:
        """After answers that carried the replicas' loads, which are fresher than any heartbeat.

        Args:
            loads: of each replica, and the rows this router has sent it and not got back.
        """
        fresh = {}
        for life, load, own_rows in loads:
            old = self.replicas.get(life[0])
            if old is not None and old.life == life:
                others_rows = max(0, load.queued_rows - own_rows)
                aside = old.set_aside, old.aside_until
                fresh[life[0]] = Replica(old.life, old.state, load, now_s, *aside, others_rows)
        if not fresh:
            return self
        replicas = MappingProxyType({**self.replicas, **fresh})
        return type(self)(self.version + 1, replicas, self.holders)

    def without_work_for(self, life: Life, reason: str, until: Until = "heartbeat") -> Self:
        """Give the replica no more work until something brings it back."""
        old = self.replicas.get(life[0])
        if old is None or old.life != life or old.set_aside:
            return self
        aside = replace(old, set_aside=reason, aside_until=until)
        return self._with(aside, keep_holders=False)

    def with_probed(self, life: Life) -> Self:
        """After a replica has answered a probe."""
        old = self.replicas.get(life[0])
        if old is None or old.life != life or not old.set_aside or old.aside_until != "probe":
            return self
        return self._with(replace(old, set_aside=""), keep_holders=False)

    def is_spare(self, name: str) -> bool:
        """Whether everything the replica takes work for has another holder."""
        state = self.replicas[name].state
        held = [(own.layer, expert) for own in state.holds for expert in own.experts]
        return all(len(self.holders.get(key, ())) > 1 for key in held)

    def without(self, name: str) -> Self:
        """After a replica has left."""
        if name not in self.replicas:
            return self
        rest = MappingProxyType({n: r for n, r in self.replicas.items() if n != name})
        return replace(self, version=self.version + 1, replicas=rest, holders=_holders(rest))

    def _with(self, replica: Replica, *, keep_holders: bool) -> Self:
        replicas = MappingProxyType({**self.replicas, replica.name: replica})
        holders = self.holders if keep_holders else _holders(replicas)
        return replace(self, version=self.version + 1, replicas=replicas, holders=holders)
