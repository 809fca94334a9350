"""The controller's process: ControllerService beside the controller. Imports no torch."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from expertmesh.runtime.json_logs import setup_logging
from expertmesh.runtime.security.redis_secrets import RedisSecrets
from expertmesh.runtime.security.server import mesh_access
from expertmesh.runtime.security.settings import SecuritySettings
from expertmesh.runtime.server import MeshServer
from expertmesh.runtime.state import Lease, MeshWatcher
from expertmesh.runtime.tasks import end
from expertmesh.services.controller.controller import Controller
from expertmesh.services.controller.mesh import Replicas
from expertmesh.services.security import public_security
from expertmesh.services.settings import ControllerSettings, MeshSettings
from expertmesh.v1 import placement_pb2 as pb
from expertmesh.v1 import placement_pb2_grpc

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["ControllerService"].full_name
_STOP_GRACE_S = 1.0


class ControllerServicer(placement_pb2_grpc.ControllerServiceServicer):
    """Tells the plan."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def GetPlan(self, request: pb.GetPlanRequest, context: Any) -> pb.PlacementPlan:
        """The newest."""
        return self._controller.plan


@asynccontextmanager
async def controlling(
    settings: ControllerSettings,
    redis_url: str,
    mesh: str,
    at: Callable[[str], None] = lambda point: None,
    *,
    redis_secrets: RedisSecrets | None = None,
    security: SecuritySettings | None = None,
) -> AsyncIterator[str]:
    """A controller and its server inside the block; yields its "host:port".

    Args:
        at: see `Executor`.
        redis_secrets: where the password of Redis is, and certificates.
        security: certificate, also to call replicas with, and who may call.
    """
    security = security or SecuritySettings()
    async with AsyncExitStack() as stack:
        lease = Lease(redis_url, mesh, settings.lease_s, redis_secrets=redis_secrets)
        stack.push_async_callback(lease.leave)
        replicas = Replicas(mesh_access(security.tls, mesh))
        watcher = MeshWatcher(
            redis_url, mesh, replicas.on_state, replicas.on_gone, secrets=redis_secrets
        )
        await stack.enter_async_context(watcher)
        controller = Controller(settings, replicas, lease, at)
        servicer = ControllerServicer(controller)
        server = MeshServer(
            [SERVICE],
            lambda own: placement_pb2_grpc.add_ControllerServiceServicer_to_server(servicer, own),
            security=public_security(security, mesh),
        )
        port = await server.start(settings.host, settings.port)
        stack.push_async_callback(server.stop, _STOP_GRACE_S)
        running = asyncio.create_task(controller.run(), name="controller")
        stack.push_async_callback(end, running)
        yield f"{settings.host}:{port}"


def run_controller(settings: MeshSettings, redis_url: str) -> None:
    """Serve until SIGTERM or SIGINT; a move under way is left to the next controller."""
    setup_logging(settings.log_level)
    asyncio.run(_serve(settings, redis_url))


async def _serve(settings: MeshSettings, redis_url: str) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopping.set)
    async with controlling(
        settings.controller,
        redis_url,
        settings.mesh,
        redis_secrets=settings.redis,
        security=settings.security,
    ) as address:
        logger.info("controller (%s) listens on %s", settings.controller.mode, address)
        await stopping.wait()
