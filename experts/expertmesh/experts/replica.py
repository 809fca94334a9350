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

import grpc
import torch

from expertmesh.experts.admission import Holding
from expertmesh.experts.batcher import MicroBatcher
from expertmesh.experts.deployment import DRAIN_TIMEOUT_S, ExpertGroupArgs
from expertmesh.experts.guests import Guests
from expertmesh.experts.limits import BatchLimits
from expertmesh.experts.listening import listen, node_address, security_of
from expertmesh.experts.live_config import GroupScaling, LiveConfig
from expertmesh.experts.load_report import rule_as_numbers
from expertmesh.experts.loading import LoadedExperts, load_experts
from expertmesh.experts.local_server import LocalServer
from expertmesh.experts.placement_servicer import SERVICE as PLACEMENT
from expertmesh.experts.placement_servicer import PlacementServicer
from expertmesh.experts.replica_load import load_report
from expertmesh.experts.residency import ExpertKey
from expertmesh.experts.residency_state import ResidencyMetrics, residency_state, resident_bits
from expertmesh.experts.servicer import SERVICE, ExpertServicer
from expertmesh.experts.trials import Trials
from expertmesh.runtime.config import validate
from expertmesh.runtime.device import probe_for
from expertmesh.runtime.heap import keep_freed_memory
from expertmesh.runtime.json_logs import setup_logging
from expertmesh.runtime.server import MeshServer
from expertmesh.runtime.state import ReplicaPublisher
from expertmesh.runtime.telemetry import Telemetry, configure
from expertmesh.runtime.tensors import wire_dtype
from expertmesh.v1 import control_pb2, placement_pb2_grpc

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
        self._trials = Trials(loaded, batcher)
        self._probe = probe_for(loaded.device.type, args.threads)
        self._device = self._probe.read()
        self._held = [
            ExpertKey(layer, expert)
            for layer, own in sorted(loaded.experts.items())
            for expert in own
        ]
        """In the order of the heartbeat's `holds`."""
        self._scaling: GroupScaling | None = None
        self._residency_metrics = ResidencyMetrics(telemetry.metrics, args.group)
        self._status = control_pb2.REPLICA_STATUS_READY
        self._resources = AsyncExitStack()
        self._publisher: ReplicaPublisher | None = None
        holding = _holding(args, loaded)
        servicer = ExpertServicer(batcher, holding, self.state, self.load, telemetry, args.group)
        self._incarnation = time.time_ns() // 1000
        self._guests = self._make_guests(holding, servicer)
        self._server = self._make_server(servicer)
        self._local_server = LocalServer(servicer, args.max_message_bytes)
        self._local_socket = ""
        self.group = args.group
        self.address = ""

    def _make_guests(self, holding: Holding, servicer: ExpertServicer) -> Guests:
        return Guests(
            self._loaded,
            holding,
            self._args.guest_memory_bytes,
            lambda: self._probe.read().free_bytes,
            self._trials.try_out,
            servicer.rows,
            self._announce,
            lambda: self._publisher is not None and self._publisher.connected,
        )

    def _make_server(self, servicer: ExpertServicer) -> MeshServer:
        placement = PlacementServicer(self._loaded, self._guests, servicer.rows, self._incarnation)

        def add_services(server: grpc.aio.Server) -> None:
            servicer.add_to(server)
            placement_pb2_grpc.add_PlacementServiceServicer_to_server(placement, server)

        return MeshServer(
            [SERVICE, PLACEMENT],
            add_services,
            max_message_bytes=self._args.max_message_bytes,
            security=security_of(self._args),
        )

    @classmethod
    async def start(cls, args: ExpertGroupArgs, name: str) -> Self:
        """Load the experts, listen, and only then announce the replica.

        Raises:
            CheckpointError, InsufficientMemory, ConfigError: it cannot serve; nothing is left over.
        """
        setup_logging(args.log_level)
        torch.set_num_threads(args.threads)
        loaded = await asyncio.to_thread(load_experts, args)
        keep_freed_memory()
        telemetry = configure("expert", args.otlp_endpoint, instance=name, sample_frac=0.0)

        batch_rows = telemetry.metrics.batch_rows.share(args.group)
        compute_time = telemetry.metrics.compute_time.share(args.group)

        def on_batch(num_rows: int, compute_s: float) -> None:
            batch_rows.add(num_rows)
            compute_time.add(compute_s)

        batcher = MicroBatcher(
            loaded.compute,
            BatchLimits(),
            time.monotonic,
            merge=loaded.may_merge,
            on_batch=on_batch,
            is_ready=loaded.is_ready,
        )
        replica = cls(args, name, loaded, batcher, telemetry)
        await replica._open()
        logger.info("replica %s of group %s serves at %s", name, args.group, replica.address)
        return replica

    async def _open(self) -> None:
        async with AsyncExitStack() as stack:
            stack.callback(self._telemetry.shutdown)
            stack.callback(self._loaded.close)
            await stack.enter_async_context(self._batcher)
            host = self._args.host or node_address()
            self.address = f"{host}:{await listen(self._server, host, self._args.ports)}"
            stack.push_async_callback(self._server.stop, _STOP_GRACE_S)
            if self._args.local_socket:
                self._local_socket = self._local_server.start()
                stack.push_async_callback(self._local_server.stop, _STOP_GRACE_S)
            await self.check_health()
            await self._trials.rehearse()
            publisher = ReplicaPublisher(
                self._args.redis_url,
                self._args.mesh,
                self.state,
                interval_s=self._args.heartbeat_s,
                lease_s=self._args.lease_s,
                incarnation=self._incarnation,
                secrets=self._args.redis_secrets,
            )
            self._publisher = await stack.enter_async_context(publisher)
            self._resources = stack.pop_all()

    def load(self) -> control_pb2.ReplicaLoad:
        """How busy the replica is now."""
        stats, cost = self._batcher.stats, self._batcher.stats.fit.cost
        return control_pb2.ReplicaLoad(
            queued_rows=stats.queued_rows,
            row_time_us=stats.row_time_us,
            queue_time_us=stats.queue_time_us,
            done_rows=stats.done_rows,
            free_bytes=self._device.free_bytes,
            batch_time_us=cost.batch_us,
            expert_time_us=cost.expert_us,
            row_cost_us=cost.row_us,
            resident_bits=self._resident_bits(),
            callers=self._batcher.num_callers,
            drift=stats.drift,
        )

    def _resident_bits(self) -> bytes:
        loader = self._loaded.loader
        return resident_bits(loader, self._held) if loader else b""

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
            local_socket=self._local_socket,
            residency=self._residency(),
            holds_version=self._guests.version,
        )

    def _residency(self) -> control_pb2.Residency | None:
        loader = self._loaded.loader
        if loader is None:
            return None
        self._residency_metrics.update(loader)
        return residency_state(loader)

    def set_live(self, values: Mapping[str, Any]) -> None:
        """Change what can change while running: a `LiveConfig`.

        Raises:
            ConfigError: names the wrong field; everything stays as it was.
        """
        live = validate(LiveConfig, values)
        self._loaded.set_budget(live.device_memory_bytes)
        self._batcher.limits, self._scaling = live.limits, live.scaling
        self._announce()

    def _announce(self) -> None:
        """Send a heartbeat at once."""
        if self._publisher:
            self._publisher.announce()

    def autoscaling_stats(self) -> dict[str, float]:
        """Load and rule for `ScalingPolicy`, as numbers. To be called on the event loop."""
        report = load_report(self._batcher, self._device, self._loaded.weight_bytes)
        rule = rule_as_numbers(self._scaling) if self._scaling else {}
        return report.numbers() | rule

    async def check_health(self) -> None:
        """One row through one expert, by the same queue and thread as everyone's rows.

        If it waits for its turn while others' rows are computed, the replica is busy, not sick: to
        replace it for that would lose the rows in its queue, and leave more to those that are left.

        Raises:
            InternalError: the answer has the wrong form or is not finite.
        """
        await self._trials.check_health()

    async def drain_and_stop(self) -> None:
        """Tell routers, finish what was admitted, leave the mesh, close. No row is lost."""
        self._status = control_pb2.REPLICA_STATUS_DRAINING
        self._announce()
        await self._server.set_not_serving()
        await asyncio.sleep(_PROPAGATION_S)
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT_S - _STOP_GRACE_S - 2 * _PROPAGATION_S):
                await self._batcher.drain()
        except TimeoutError:
            logger.error("draining took too long; %d rows are lost", self.load().queued_rows)
        await self._resources.aclose()  # leaves the mesh, then stops the server
        logger.info("replica %s of group %s has left", self._name, self._args.group)


def _holding(args: ExpertGroupArgs, loaded: LoadedExperts) -> Holding:
    return Holding(
        args.model,
        {layer: frozenset(own) for layer, own in loaded.experts.items()},
        loaded.dtype,
        loaded.hidden_size,
        args.reject_nonfinite,
    )
