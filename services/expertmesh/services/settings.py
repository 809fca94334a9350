"""The configuration of a mesh: one YAML file, one schema, shared by every command."""

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from expertmesh.experts.limits import BatchLimits, Heartbeats
from expertmesh.runtime.channels import DEFAULT_MAX_MESSAGE_BYTES, GREATEST_MAX_MESSAGE_BYTES
from expertmesh.runtime.config import Settings

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Port = Annotated[int, Field(ge=0, le=65535)]


class RedisSettings(Settings):
    """Live state."""

    url: str | None = None
    """"redis://host:port/db" of a server of yours; none starts an embedded one."""


class ExpertsSettings(Heartbeats):
    """The expert groups and their replicas."""

    groups: int = 4
    """Expert groups to split each layer's experts into: 1 to the number of experts."""
    replicas: PositiveInt = 1
    """Replicas of each group."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" computes on a GPU if Ray gave the replica one, else on the CPU."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs Ray reserves for a replica; fractions share a GPU."""
    num_cpus: NonNegativeFloat = 0.0
    """CPUs Ray reserves for a replica."""
    threads: PositiveInt = 1
    """Threads of a replica's CPU matrix multiplications."""
    host: str = "127.0.0.1"
    """Address replicas listen on and announce; "" is each node's own."""
    limits: BatchLimits = BatchLimits()
    """Queue and batch bounds."""
    reject_nonfinite: bool = False
    """Answer rows with NaN or infinity with an error instead of computing them."""


class RouterSettings(Settings):
    """RouterService."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 50051
    """Port to listen on; 0 takes a free one."""
    call_timeout_s: PositiveFloat = 30.0
    """Time a call may take if its caller gives no deadline."""


class GatewaySettings(Settings):
    """The dense part of the model and GenerateService."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 50052
    """Port to listen on; 0 takes a free one."""
    engine: Literal["auto", "continuous", "exact"] = "auto"
    """"continuous" batches prompts; "exact" runs one at a time, as transformers' generate does;
    "auto" is continuous where the model supports it."""
    threads: PositiveInt = 1
    """Threads of the gateway's CPU matrix multiplications."""
    kv_cache_tokens: PositiveInt = 16384
    """Tokens the key-value cache of continuous batching holds."""
    max_batch_tokens: PositiveInt = 1024
    """Tokens in one forward of continuous batching at most."""
    max_running: PositiveInt = 32
    """Requests in one batch of continuous batching at most."""
    max_waiting: NonNegativeInt = 256
    """Requests waiting for their turn at most; beyond it callers get QueueFull."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs Ray reserves for the gateway."""
    num_cpus: NonNegativeFloat = 0.0
    """CPUs Ray reserves for the gateway."""


class MeshSettings(Settings):
    """Everything. Each field can be set as EXPERTMESH_FIELD or EXPERTMESH_SECTION__FIELD too."""

    model: str = Field(min_length=1)
    """Hugging Face checkpoint directory."""
    model_name: str = ""
    """Name of the model in requests; "" is the directory's name."""
    mesh: str = Field(default="default", pattern=r"^[A-Za-z0-9_.-]+$")
    """Name space in Redis: meshes of different names share a server without seeing each other."""
    dtype: Dtype = "auto"
    """Compute dtype of gateway and experts; "auto" is the checkpoint's."""
    deterministic: bool = False
    """Give every caller the bits it would get alone, whoever else is served; slower under load."""
    max_message_bytes: int = Field(
        default=DEFAULT_MAX_MESSAGE_BYTES, ge=1, le=GREATEST_MAX_MESSAGE_BYTES
    )
    """Largest gRPC message anywhere in the mesh."""
    otlp_endpoint: str | None = None
    """OpenTelemetry collector, "host:port"; none switches telemetry off."""
    trace_sample_frac: float = Field(default=0.01, ge=0, le=1)
    """Share of the traces that begin here and are recorded; a caller that sends a `traceparent`
    decides for itself."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Level of all logs."""
    redis: RedisSettings = RedisSettings()
    experts: ExpertsSettings = ExpertsSettings()
    router: RouterSettings = RouterSettings()
    gateway: GatewaySettings = GatewaySettings()

    @model_validator(mode="after")
    def _deterministic_to_the_end(self) -> Self:
        if self.deterministic and self.gateway.engine == "continuous":
            raise ValueError(
                "gateway.engine: batching prompts changes bits, so a deterministic mesh takes "
                "'auto' or 'exact'"
            )
        return self
