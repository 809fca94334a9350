"""The mesh as a router last saw it: immutable, swapped whole, versioned. Time is passed in."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Self

from expertmesh.v1 import control_pb2

Key = tuple[int, int]
"""(layer, expert)"""
Life = tuple[str, int]
"""(replica id, incarnation): names one process, not its successor"""

_NO_REPLICAS: Mapping[str, "Replica"] = MappingProxyType({})
_NO_HOLDERS: Mapping[Key, tuple[str, ...]] = MappingProxyType({})


@dataclass(frozen=True)
class Replica:
    """One replica as its newest heartbeat or answer described it."""

    state: control_pb2.ReplicaState
    load: control_pb2.ReplicaLoad
    """Of the newest heartbeat or answer, whichever came last."""
    heard_s: float
    """When this router heard it, by this router's clock."""
    set_aside: str = ""
    """Why it gets no work now; "" when it does."""

    @property
    def name(self) -> str:
        """Its id, unique in the mesh."""
        return self.state.replica

    @property
    def life(self) -> Life:
        """Which process it is."""
        return self.state.replica, self.state.incarnation

    @property
    def takes_work(self) -> bool:
        """Whether rows may be sent to it."""
        return not self.set_aside and self.state.status == control_pb2.REPLICA_STATUS_READY


def _is_newer(new: control_pb2.ReplicaState, old: control_pb2.ReplicaState) -> bool:
    return (new.incarnation, new.sequence) > (old.incarnation, old.sequence)


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

    def with_state(self, state: control_pb2.ReplicaState, now_s: float) -> Self:
        """After a heartbeat. Older or repeated ones change nothing.

        A heartbeat newer than the one at which a replica was set aside brings it back.
        """
        old = self.replicas.get(state.replica)
        if old and not _is_newer(state, old.state):
            return self
        fresh = Replica(state, state.load, now_s)
        same_work = old is not None and (
            old.takes_work == fresh.takes_work and old.state.holds == state.holds
        )
        return self._with(fresh, keep_holders=same_work)

    def with_loads(
        self, loads: Iterable[tuple[Life, control_pb2.ReplicaLoad]], now_s: float
    ) -> Self:
        """After answers that carried the replicas' loads, which are fresher than any heartbeat."""
        fresh = {}
        for life, load in loads:
            old = self.replicas.get(life[0])
            if old is not None and old.life == life:
                fresh[life[0]] = Replica(old.state, load, now_s, old.set_aside)
        if not fresh:
            return self
        replicas = MappingProxyType({**self.replicas, **fresh})
        return type(self)(self.version + 1, replicas, self.holders)

    def without_work_for(self, life: Life, reason: str) -> Self:
        """Give the replica no more work until a newer heartbeat of it arrives."""
        old = self.replicas.get(life[0])
        if old is None or old.life != life or old.set_aside:
            return self
        return self._with(replace(old, set_aside=reason), keep_holders=False)

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
