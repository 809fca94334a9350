"""The Ray Serve application of the gateway. Imports no torch: Serve's build task needs none.

`import_path: expertmesh.services.gateway.deployment:build`, with `args` as in `GatewayArgs`.
"""

from ray import serve

from expertmesh.runtime.imports import collector_paused
from expertmesh.services.gateway.args import GatewayArgs

_CLOSING_S = 20.0  # for what comes after the calls: the engine, the last telemetry


class GatewayDeployment:
    """What Serve runs: the gateway on Serve's user loop."""

    async def __init__(self, args: GatewayArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        with collector_paused():
            from expertmesh.services.gateway.gateway import Gateway  # torch is imported here

        self._gateway: Gateway | None = None
        self._gateway = await Gateway.start(args)

    async def check_health(self) -> None:
        """Raises when the engine has died; Serve then replaces the gateway."""
        assert self._gateway
        self._gateway.check_health()

    async def __del__(self) -> None:
        gateway, self._gateway = self._gateway, None
        if gateway is not None:
            await gateway.stop()


def build(args: GatewayArgs) -> serve.Application:
    """The gateway's application: one deployment of one replica, as it listens on a fixed port."""
    deployment = serve.deployment(
        name="gateway",
        num_replicas=1,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=args.drain_s + _CLOSING_S,
    )
    return deployment(GatewayDeployment).bind(args)
