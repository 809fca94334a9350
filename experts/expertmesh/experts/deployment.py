"""The Ray Serve application of one expert group. Imports no torch: Serve's build task needs none.

`import_path: expertmesh.experts.deployment:build` in a Serve config or a RayService manifest, with
`args` as in `ExpertGroupArgs`. Deploy through Serve's config path: `serve.run` restarts replicas.
"""

from typing import Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from ray import serve

from expertmesh.experts.limits import BatchLimits, Heartbeats
from expertmesh.runtime.channels import DEFAULT_MAX_MESSAGE_BYTES, GREATEST_MAX_MESSAGE_BYTES

HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 5.0
DRAIN_TIMEOUT_S = 30.0


class ExpertGroupArgs(Heartbeats):
    """What one expert group is. A change restarts its replicas; one of `user_config` does not."""

    group: str = Field(min_length=1)
    """Name of the group and of its Serve deployment."""
    model_dir: str
    """Hugging Face checkpoint directory, readable on every node that runs the group."""
    model: str
    """Name of the model in requests."""
    experts: str | dict[int, str]
    """Expert ids held in every MoE layer, like "0-3,7", or by layer."""
    redis_url: str
    """Where heartbeats go."""
    mesh: str = "default"
    """Name space in Redis; routers of the same mesh see the group."""
    dtype: str = "auto"
    """Compute dtype; "auto" takes the checkpoint's."""
    device: str = "auto"
    """"cuda", "cpu" or "auto": a GPU if Ray gave the replica one."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs Ray reserves for a replica; fractions share a GPU."""
    num_cpus: NonNegativeFloat = 0.0
    """CPUs Ray reserves for a replica."""
    threads: PositiveInt = 1
    """Threads of a replica's CPU matrix multiplications."""
    host: str = ""
    """Address the replica's gRPC server listens on and announces; "" is the node's."""
    port: NonNegativeInt = 0
    """Port of the server; 0 lets the kernel choose."""
    deterministic: bool = False
    """Give every caller the bits it would get alone, whoever else is served; slower under load."""
    reject_nonfinite: bool = False
    """Answer rows with NaN or infinity with an error instead of computing them."""
    max_message_bytes: int = Field(
        default=DEFAULT_MAX_MESSAGE_BYTES, ge=1, le=GREATEST_MAX_MESSAGE_BYTES
    )
    """Largest gRPC message accepted."""
    otlp_endpoint: str | None = None
    """OpenTelemetry collector, "host:port"; none switches telemetry off."""
    log_level: str = "INFO"
    """Level of the replica's log."""


class ExpertGroup:
    """What Serve runs: starts the replica on Serve's user loop and hands Serve's hooks to it."""

    async def __init__(self, args: ExpertGroupArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        from expertmesh.experts.replica import Replica  # torch is imported here, in the replica

        context = serve.get_replica_context()
        self._replica: Replica | None = None
        self._replica = await Replica.start(args, name=context.replica_tag)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's `user_config`: queue and batch limits, changed without a restart."""
        assert self._replica
        self._replica.set_limits(user_config)

    async def check_health(self) -> None:
        """Runs one row through an expert; raising makes Serve replace the replica."""
        assert self._replica
        await self._replica.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Load for Serve's autoscaling policies; traffic does not pass through Serve's handles."""
        assert self._replica
        return self._replica.autoscaling_stats()

    def record_replica_metadata(self) -> dict[str, str]:
        """Lets Serve's controller know the endpoint as well."""
        assert self._replica
        return {"address": self._replica.address}

    async def __del__(self) -> None:
        """Serve's only shutdown hook; Python's collector may call it once more."""
        replica, self._replica = self._replica, None
        if replica is not None:
            await replica.drain_and_stop()


def build(args: ExpertGroupArgs) -> serve.Application:
    """The group's application: one deployment named like the group."""
    deployment = serve.deployment(
        name=args.group,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        user_config=BatchLimits().model_dump(),
        max_surge_percent=100,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=DRAIN_TIMEOUT_S,
    )
    return deployment(ExpertGroup).bind(args)
