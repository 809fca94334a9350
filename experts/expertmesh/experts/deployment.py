"""The Ray Serve application of one expert group. Imports no torch: Serve's build task needs none.

`import_path: expertmesh.experts.deployment:build` in a Serve config or a RayService manifest, with
`args` as in `ExpertGroupArgs`. Deploy through Serve's config path: `serve.run` restarts replicas.
"""

import logging
from typing import Any

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)
from ray import serve

from expertmesh.experts.limits import BatchLimits, Heartbeats
from expertmesh.runtime.channels import DEFAULT_MAX_MESSAGE_BYTES, GREATEST_MAX_MESSAGE_BYTES
from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.imports import collector_paused
from expertmesh.runtime.ports import PortRange
from expertmesh.runtime.security.redis_secrets import RedisSecrets, without_password
from expertmesh.runtime.security.settings import TlsSettings

logger = logging.getLogger(__name__)

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
    """Where heartbeats go; without a password, as Serve logs its arguments."""
    redis_secrets: RedisSecrets = RedisSecrets()
    """Where the password of Redis is, and certificates."""
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
    label_selector: dict[str, str] = Field(default={})
    """Labels of the Ray nodes that may run the group."""
    threads: PositiveInt = 1
    """Threads of a replica's CPU matrix multiplications."""
    device_memory_bytes: PositiveInt | None = None
    """Device memory for the weights of a replica's experts; those that do not fit are loaded when
    they are needed. None holds all of them, or if they do not fit, 90 % of what is free."""
    host_memory_bytes: NonNegativeInt = 0
    """Host memory (pinned for a GPU) for weights that the device does not hold, ready to be copied
    there; what it does not hold either is read from the checkpoint."""
    guest_memory_bytes: NonNegativeInt = 0
    """Device memory for experts that the controller brings to a replica beside its own, as copies
    of hot ones; 0 takes none."""
    prefetch: bool = True
    """Load the experts that the next layer will probably need before they are asked for."""
    simulated_load_bytes_per_s: PositiveFloat | None = None
    """Slows loads down to this rate. It stands for the link to a GPU where there is none, for tests
    and benchmarks on a CPU; none does not slow down."""
    host: str = ""
    """Address the replica's gRPC server listens on and announces; "" is the node's."""
    ports: PortRange = ""
    """Ports of the server, like "20000-20015": it takes the first free one; "" is any."""
    tls: TlsSettings = TlsSettings()
    """Certificate of the replica; with it, only processes with the mesh's identity can call."""
    insecure: bool = False
    """Listen without TLS on an address that is not loopback."""
    local_socket: bool = True
    """Let routers of the same host and user call over a Unix socket instead of gRPC."""
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

    @field_validator("redis_url")
    @classmethod
    def _no_password(cls, url: str) -> str:
        return without_password(url)


class ExpertGroup:
    """What Serve runs: starts the replica on Serve's user loop and hands Serve's hooks to it."""

    async def __init__(self, args: ExpertGroupArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        with collector_paused():
            from expertmesh.experts.replica import Replica  # torch is imported here, in the replica

        context = serve.get_replica_context()
        self._replica: Replica | None = None
        self._is_configured = False
        self._replica = await Replica.start(args, name=context.replica_tag)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's `user_config`, a `LiveConfig`: changed without a restart.

        Serve kills a replica that raises here, without a drain. So a wrong field ends a replica
        that has just been started, and one that serves keeps what it has.
        """
        assert self._replica
        try:
            self._replica.set_live(user_config)
        except ConfigError as error:
            if not self._is_configured:
                raise
            logger.error("user_config is refused, all stays as it is: %s", error.message)
        self._is_configured = True

    async def check_health(self) -> None:
        """Runs one row through an expert; raising makes Serve replace the replica."""
        assert self._replica
        await self._replica.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Load for Serve's autoscaling policies; traffic does not pass through Serve's handles."""
        assert self._replica
        return self._replica.autoscaling_stats()

    async def __call__(self, request: object) -> dict[str, str]:
        """Serve's HTTP route of the group: who answers. It is there for KubeRay, whose readiness
        check of a worker passes only where a route leads to a replica; rows come over gRPC."""
        assert self._replica
        return {"group": self._replica.group, "address": self._replica.address}

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
    return build_with(ExpertGroup, args)


def build_with(kind: type[ExpertGroup], args: ExpertGroupArgs) -> serve.Application:
    """The same with replicas of another kind."""
    deployment = serve.deployment(
        name=args.group,
        ray_actor_options={
            "num_cpus": args.num_cpus,
            "num_gpus": args.num_gpus,
            "label_selector": args.label_selector,
        },
        user_config=BatchLimits().model_dump(),
        max_surge_percent=100,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=DRAIN_TIMEOUT_S,
    )
    return deployment(kind).bind(args)
