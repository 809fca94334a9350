"""The router of a virtual mesh: the snapshot, standings and `share_out` of the real one.

Virtual replicas send the real messages (`ReplicaState`, `ReplicaLoad`), so what the router sees of
them passes through the code that sees real ones.
"""

from collections.abc import Mapping, Sequence
from random import Random

from expertmesh.router.pools import Standing
from expertmesh.router.snapshot import Snapshot
from expertmesh.router.standing import standing_of
from expertmesh.router.waterfill import Shares, share_out
from expertmesh.runtime.errors import ExpertUnavailable
from expertmesh.services.simulator.fleet import Phase, VirtualReplica
from expertmesh.v1 import control_pb2, tensor_pb2

_STATUS = {
    Phase.READY: control_pb2.REPLICA_STATUS_READY,
    Phase.DRAINING: control_pb2.REPLICA_STATUS_DRAINING,
}


def load_of(replica: VirtualReplica, queued_rows: float = 0.0) -> control_pb2.ReplicaLoad:
    """What a replica that knows its costs says of itself."""
    costs = replica.costs
    return control_pb2.ReplicaLoad(
        queued_rows=int(queued_rows),
        done_rows=int(replica.rows),
        batch_time_us=costs.batch_us,
        expert_time_us=costs.expert_us,
        row_cost_us=costs.row_us,
        row_time_us=costs.row_us,
    )


class VirtualRouter:
    """Knows replicas by what they announce.

    Args:
        experts: of each group, in every layer.
        layers: that are simulated.
        transport_us: a message to a replica and back.
    """

    def __init__(
        self,
        experts: Sequence[Sequence[int]],
        layers: Sequence[int],
        transport_us: float,
        random: Random,
    ) -> None:
        self.snapshot = Snapshot()
        self.own_rows: dict[str, int] = {}
        """Sent to each replica and not yet answered."""
        self._experts = experts
        self._layers = layers
        self._transport_us = transport_us
        self._random = random
        self._sequence = 0

    def hear(
        self, replica: VirtualReplica, now_s: float, load: control_pb2.ReplicaLoad | None = None
    ) -> None:
        """A heartbeat, or the end of one's lease."""
        if replica.phase is Phase.GONE:
            self.snapshot = self.snapshot.without(replica.name)
            self.own_rows.pop(replica.name, None)
            return
        self._sequence += 1
        experts = self._experts[replica.group]
        state = control_pb2.ReplicaState(
            group=f"g{replica.group}",
            replica=replica.name,
            incarnation=1,
            sequence=self._sequence,
            status=_STATUS[replica.phase],
            holds=[control_pb2.LayerExperts(layer=own, experts=experts) for own in self._layers],
            dtype=tensor_pb2.DTYPE_BFLOAT16,
            load=load or load_of(replica),
        )
        own_rows = self.own_rows.get(replica.name, 0)
        self.snapshot = self.snapshot.with_state(state, now_s, own_rows)

    def answered(
        self, replica: VirtualReplica, rows: int, load: control_pb2.ReplicaLoad, now_s: float
    ) -> None:
        """An answer with the replica's load on it."""
        self.own_rows[replica.name] = self.own_rows.get(replica.name, 0) - rows
        life = (replica.name, 1)
        loads = [(life, load, self.own_rows[replica.name])]
        self.snapshot = self.snapshot.with_loads(loads, now_s)

    def broken(self, replica: VirtualReplica) -> None:
        """A connection broke: no more work, and nothing is in flight there."""
        self.snapshot = self.snapshot.without_work_for((replica.name, 1), "the connection broke")
        self.own_rows.pop(replica.name, None)

    def share(self, layer: int, rows: Mapping[int, int], now_s: float) -> Shares:
        """Who computes which rows of a call.

        Raises:
            ExpertUnavailable: nobody holds one of the experts.
        """
        holders = {expert: self.snapshot.holders.get((layer, expert), ()) for expert in rows}
        if missing := [expert for expert, names in holders.items() if not names]:
            raise ExpertUnavailable(
                f"layer {layer}, expert {missing[0]}: no live replica holds it",
                layer=layer,
                expert=missing[0],
            )
        return share_out(
            rows, holders, lambda name: self._standing(name, layer, now_s), self._random
        )

    def sent(self, name: str, rows: int) -> None:
        """Rows are on their way."""
        self.own_rows[name] = self.own_rows.get(name, 0) + rows

    def _standing(self, name: str, layer: int, now_s: float) -> Standing:
        replica = self.snapshot.replicas[name]
        own_rows = self.own_rows.get(name, 0)
        return standing_of(replica, layer, own_rows, self._transport_us, now_s - replica.heard_s)
