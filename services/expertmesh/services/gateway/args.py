"""What a gateway is told. Imports neither torch nor Ray: a gateway may run without Ray."""

from pydantic import field_validator

from expertmesh.router.failover import FailoverSettings
from expertmesh.runtime.missing_experts import Policy
from expertmesh.runtime.security.redis_secrets import RedisSecrets, without_password
from expertmesh.runtime.security.settings import SecuritySettings
from expertmesh.services.settings import Dtype, GatewaySettings, MeshSettings, SelectionSettings


class GatewayArgs(GatewaySettings):
    """A gateway: its own settings and what it shares with the mesh."""

    model_dir: str
    """Hugging Face checkpoint directory; the dense part is read from it."""
    model: str
    """Name of the model in requests."""
    redis_url: str
    """Where the replicas' heartbeats are; without a password, as Serve logs its arguments."""
    redis_secrets: RedisSecrets = RedisSecrets()
    """Where the password of Redis is, and certificates."""
    mesh: str
    """Name space in Redis."""
    dtype: Dtype
    """Compute dtype."""
    deterministic: bool
    """Let "auto" take the exact engine, as batching prompts changes bits."""
    max_message_bytes: int
    """Largest gRPC message accepted or sent."""
    otlp_endpoint: str | None
    """OpenTelemetry collector, or none."""
    trace_sample_frac: float = 1.0
    """Share of the traces that begin at the gateway and are recorded."""
    log_level: str
    """Level of the gateway's log."""
    selection: SelectionSettings = SelectionSettings()
    """Which experts tokens get."""
    failover: FailoverSettings = FailoverSettings()
    """When a second copy is asked."""
    missing_experts: Policy = "strict"
    """What they get when experts are missing."""
    security: SecuritySettings = SecuritySettings()
    """Certificate and who may call."""

    @field_validator("redis_url")
    @classmethod
    def _no_password(cls, url: str) -> str:
        return without_password(url)


def gateway_args(settings: MeshSettings, model: str, redis_url: str) -> GatewayArgs:
    """The gateway of the same mesh."""
    return GatewayArgs(
        model_dir=settings.model,
        model=model,
        redis_url=redis_url,
        redis_secrets=settings.redis.secrets(),
        mesh=settings.mesh,
        dtype=settings.dtype,
        deterministic=settings.deterministic,
        max_message_bytes=settings.max_message_bytes,
        otlp_endpoint=settings.otlp_endpoint,
        trace_sample_frac=settings.trace_sample_frac,
        log_level=settings.log_level,
        selection=settings.selection,
        failover=settings.failover,
        missing_experts=settings.missing_experts.policy,
        security=settings.security,
        **settings.gateway.model_dump(),
    )
