"""The ways to all replicas: a stream to each, what is known of its times, and when it is late."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from expertmesh.router.backlog import Backlog
from expertmesh.router.failover import FailoverSettings, HedgeBudget
from expertmesh.router.latency import Latencies
from expertmesh.router.plan import Shipment
from expertmesh.router.snapshot import Life, Replica
from expertmesh.router.streams import FIRST_TRANSPORT_US, ReplicaStream
from expertmesh.runtime.errors import CannotMakeIt
from expertmesh.runtime.metrics import Buckets, Share
from expertmesh.runtime.origin import Origin
from expertmesh.runtime.security.access import PLAIN, Access
from expertmesh.runtime.telemetry import Telemetry

STAGE = "router"


class GroupShares(NamedTuple):
    """What the router counts of every message to a group."""

    rows: Share
    in_flight_rows: Share
    transport_time: Buckets


_FIRST_LATE_S = 0.1
_FIRST_LATE_COSTS = 4.0
"""While no times are known, late is this many times what the replica says it costs."""
_SILENT_LATES = 4.0


class Shipper:
    """The streams to all replicas, opened when first used.

    Args:
        model: name of the model in requests.
        max_message_bytes: larger shipments are refused.
        clock: seconds, monotonic.
        access: how to connect to replicas.
    """

    def __init__(
        self,
        model: str,
        telemetry: Telemetry,
        max_message_bytes: int,
        clock: Callable[[], float],
        failover: FailoverSettings,
        access: Access = PLAIN,
    ) -> None:
        self.model = model
        self.telemetry = telemetry
        self.clock = clock
        self.budget = HedgeBudget(failover)
        self.latencies = Latencies()
        """Of all replicas."""
        self.backlog = Backlog()
        self._silent_s = failover.silent_s
        self._max_message_bytes = max_message_bytes
        self._access = access
        self._streams: dict[Life, ReplicaStream] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._shares: dict[str, GroupShares] = {}

    def shares(self, group: str) -> GroupShares:
        """The counts of a group, for the event loop alone."""
        shares = self._shares.get(group)
        if shares is None:
            metrics = self.telemetry.metrics
            shares = self._shares[group] = GroupShares(
                metrics.rows.share(STAGE, group),
                metrics.in_flight_rows.share(STAGE, group),
                metrics.transport_time.share(group),
            )
        return shares

    def stream(self, replica: Replica) -> ReplicaStream:
        """The open stream to a replica."""
        stream = self._streams.get(replica.life)
        if stream is not None and stream.closed:
            self._drop(replica.life, stream)
            stream = None
        if stream is None:
            stream = self._streams[replica.life] = self.new_stream(replica)
        return stream

    def new_stream(self, replica: Replica) -> ReplicaStream:
        """One that nobody else uses; whoever asks for it closes it."""
        state = replica.state
        return ReplicaStream(
            state.address, self._max_message_bytes, state.local_socket, self.clock, self._access
        )

    def renew(self, life: Life) -> None:
        """Give up a stream on which nothing comes; what is pending on it fails and is retried."""
        stream = self._streams.get(life)
        if stream is not None:
            self._drop(life, stream)

    def in_flight_rows(self, life: Life) -> int:
        """Rows sent to a replica and not yet answered."""
        stream = self._streams.get(life)
        return stream.in_flight_rows if stream else 0

    def under_way(self, life: Life) -> tuple[int, float]:
        """Rows sent to a replica and not yet answered, and what a message there and back takes
        without the compute, in microseconds."""
        stream = self._streams.get(life)
        if stream is None:
            return 0, FIRST_TRANSPORT_US
        return stream.in_flight_rows, stream.transport_us(self.clock())

    def too_late(
        self,
        shipments: Sequence[Shipment],
        replicas: Sequence[Replica],
        origin: Origin,
        deadline_s: float,
    ) -> dict[str, CannotMakeIt]:
        """See `Backlog.too_late`."""
        times = (self.clock(), deadline_s)
        return self.backlog.too_late(shipments, replicas, origin, times, self.in_flight_rows)

    # -- time ------------------------------------------------------------------------------------

    def late_s(self, replica: Replica, num_rows: int, others: Iterable[Replica] = ()) -> float:
        """Time after which the answer for that many rows is late: by the replica's own times, or by
        those of others that could be asked if these are shorter, as one that is always slow is
        never late by its own. By everybody's while none of these are known.

        Args:
            others: that hold the same experts.
        """
        best_s = self._late_s(replica, num_rows)
        for other in others:
            own_s = self._late_s(other, num_rows)
            if own_s is not None and (best_s is None or own_s < best_s):
                best_s = own_s
        if best_s is None:
            best_s = self.latencies.late_s(num_rows)
        if best_s is not None:
            return best_s
        costs = replica.costs
        cost_us = costs.batch_us + num_rows * (costs.row_us + costs.expert_us)
        return max(_FIRST_LATE_S, _FIRST_LATE_COSTS * cost_us / 1e6)

    def _late_s(self, replica: Replica, num_rows: int) -> float | None:
        stream = self._streams.get(replica.life)
        return stream.latencies.late_s(num_rows) if stream else None

    def is_late(self, replica: Replica) -> bool:
        """Whether its oldest request has waited for longer than such requests do."""
        stream = self._streams.get(replica.life)
        if stream is None or not stream.in_flight_rows:
            return False
        return stream.waiting_s() > self.late_s(replica, stream.oldest_rows())

    def is_silent(self, replica: Replica) -> bool:
        """Whether it has been asked and nothing has come for too long."""
        stream = self._streams.get(replica.life)
        if stream is None or not stream.in_flight_rows:
            return False
        late_s = self.late_s(replica, stream.oldest_rows())
        return stream.silent_s() > max(self._silent_s, _SILENT_LATES * late_s)

    # -- the end ---------------------------------------------------------------------------------

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
