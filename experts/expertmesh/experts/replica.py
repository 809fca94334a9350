"""One replica of an expert group: its experts in memory, its queue, its gRPC server, its heartbeat.

Composed here and nowhere else; Serve (deployment.py) and tests start it the same way.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import Any, Self

import torch

from expertmesh.experts.admission import Holding
from expertmesh.experts.batch import PackedRows
from expertmesh.experts.batcher import MicroBatcher
from expertmesh.experts.deployment import DRAIN_TIMEOUT_S, ExpertGroupArgs
from expertmesh.experts.limits import BatchLimits
from expertmesh.experts.loading import LoadedExperts, load_experts
from expertmesh.experts.servicer import SERVICE, ExpertServicer
from expertmesh.runtime.config import validate
from expertmesh.runtime.device import probe_for
from expertmesh.runtime.errors import ExpertMeshError, InternalError
from expertmesh.runtime.json_logs import setup_logging
from expertmesh.runtime.server import MeshServer
from expertmesh.runtime.state import ReplicaPublisher
from expertmesh.runtime.telemetry import Telemetry, configure
from expertmesh.runtime.tensors import dtype_name, wire_dtype
from expertmesh.v1 import control_pb2

logger = logging.getLogger(__name__)

_PROPAGATION_S = 0.1  # a pub/sub message reaches every router well within this
_STOP_GRACE_S = 2.0
_VERSION = version("expertmesh")


class Replica:
    """A running replica. Create with `await Replica.start(args, name)`."""

    def __init__(
        self,
        args: ExpertGroupArgs,
        name: str,
        loaded: LoadedExperts,
        batcher: MicroBatcher,
        telemetry: Telemetry,
    ) -> None:
        self._args = args
        self._name = name
        self._loaded = loaded
        self._batcher = batcher
        self._telemetry = telemetry
        self._probe = probe_for(loaded.device.type, args.threads)
        self._device = self._probe.read()
        self._status = control_pb2.REPLICA_STATUS_READY
        self._resources = AsyncExitStack()
        self._publisher: ReplicaPublisher | None = None
        holding = Holding(
            args.model,
            {layer: frozenset(own) for layer, own in loaded.experts.items()},
            loaded.dtype,
            loaded.hidden_size,
            args.reject_nonfinite,
        )
        servicer = ExpertServicer(batcher, holding, self.state, self.load, telemetry, args.group)
        self._server = MeshServer(
            [SERVICE], servicer.add_to, max_message_bytes=args.max_message_bytes
        )
        self.address = ""

    @classmethod
    async def start(cls, args: ExpertGroupArgs, name: str) -> Self:
        """Load the experts, listen, and only then announce the replica.

        Raises:
            CheckpointError, InsufficientMemory, ConfigError: it cannot serve; nothing is left over.
        """
        setup_logging(args.log_level)
        torch.set_num_threads(args.threads)
        loaded = await asyncio.to_thread(load_experts, args)
        telemetry = configure("expert", args.otlp_endpoint, instance=name)

        def on_batch(num_rows: int, compute_s: float) -> None:
            telemetry.metrics.batch_rows.record(num_rows, args.group)
            telemetry.metrics.compute_time.record(compute_s, args.group)

        batcher = MicroBatcher(
            loaded.compute,
            BatchLimits(),
            time.monotonic,
            merge=loaded.may_merge,
            on_batch=on_batch,
        )
        replica = cls(args, name, loaded, batcher, telemetry)
        await replica._open()
        logger.info("replica %s of group %s serves at %s", name, args.group, replica.address)
        return replica

    async def _open(self) -> None:
        async with AsyncExitStack() as stack:
            stack.callback(self._telemetry.shutdown)
            await stack.enter_async_context(self._batcher)
            host = self._args.host or _node_address()
            self.address = f"{host}:{await self._server.start(host, self._args.port)}"
            stack.push_async_callback(self._server.stop, _STOP_GRACE_S)
            await self.check_health()
            publisher = ReplicaPublisher(
                self._args.redis_url,
                self._args.mesh,
                self.state,
                interval_s=self._args.heartbeat_s,
                lease_s=self._args.lease_s,
            )
            self._publisher = await stack.enter_async_context(publisher)
            self._resources = stack.pop_all()

    def load(self) -> control_pb2.ReplicaLoad:
        """How busy the replica is now."""
        stats = self._batcher.stats
        return control_pb2.ReplicaLoad(
            queued_rows=stats.queued_rows,
            row_time_us=stats.row_time_us,
            queue_time_us=stats.queue_time_us,
            done_rows=stats.done_rows,
            free_bytes=self._device.free_bytes,
        )

    def state(self) -> control_pb2.ReplicaState:
        """What the replica is now; the publisher adds sequence and lease."""
        self._device = self._probe.read()
        return control_pb2.ReplicaState(
            group=self._args.group,
            replica=self._name,
            address=self.address,
            status=self._status,
            model=self._args.model,
            holds=[
                control_pb2.LayerExperts(layer=layer, experts=own)
                for layer, own in sorted(self._loaded.experts.items())
            ],
            dtype=wire_dtype(self._loaded.dtype),
            hidden_size=self._loaded.hidden_size,
            device=self._device.to_proto(),
            load=self.load(),
            weight_bytes=self._loaded.weight_bytes,
            pid=os.getpid(),
            host=socket.gethostname(),
            deterministic=self._args.deterministic,
            version=_VERSION,
            max_batch_rows=self._batcher.limits.max_batch_rows,
            max_queue_rows=self._batcher.limits.max_queue_rows,
        )

    def set_limits(self, values: Mapping[str, Any]) -> None:
        """Change queue and batch limits while running.

        Raises:
            ConfigError: names the wrong field; the old limits stay.
        """
        self._batcher.limits = validate(BatchLimits, values)
        if self._publisher:
            self._publisher.announce()

    def autoscaling_stats(self) -> dict[str, float]:
        """Load for Serve's autoscaling policies."""
        stats = self._batcher.stats
        return {
            "queued_rows": float(stats.queued_rows),
            "row_time_us": stats.row_time_us,
            "queue_time_us": stats.queue_time_us,
            "utilisation_frac": self._device.utilisation_frac,
        }

    async def check_health(self) -> None:
        """One row through one expert, by the same queue and thread as everyone's rows.

        Raises:
            InternalError: the answer has the wrong form or is not finite.
        """
        layer, experts = next(iter(sorted(self._loaded.experts.items())))
        rows_RD = torch.zeros(1, self._loaded.hidden_size, dtype=self._loaded.dtype)
        try:
            # alone: sharing a product with a caller's rows would change the caller's bits
            done = await self._batcher.submit(
                PackedRows(layer, experts[:1], (1,), rows_RD), alone=True
            )
        except ExpertMeshError as error:
            if error.retryable:  # full or draining: busy, not sick
                return
            raise
        if done.rows_RD.shape != rows_RD.shape or not bool(torch.isfinite(done.rows_RD).all()):
            got = f"{dtype_name(done.rows_RD.dtype)}{list(done.rows_RD.shape)}"
            raise InternalError(
                f"a row of zeros through expert {experts[0]} gave {got}, not finite"
            )

    async def drain_and_stop(self) -> None:
        """Tell routers, finish what was admitted, leave the mesh, close. No row is lost."""
        self._status = control_pb2.REPLICA_STATUS_DRAINING
        if self._publisher:
            self._publisher.announce()
        await self._server.set_not_serving()
        await asyncio.sleep(_PROPAGATION_S)
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT_S - _STOP_GRACE_S - 2 * _PROPAGATION_S):
                await self._batcher.drain()
        except TimeoutError:
            logger.error("draining took too long; %d rows are lost", self.load().queued_rows)
        await self._resources.aclose()  # leaves the mesh, then stops the server
        logger.info("replica %s of group %s has left", self._name, self._args.group)


def _node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
