"""The configuration of a mesh: one YAML file, one schema, shared by every command."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    model_validator,
)

from expertmesh.experts.limits import BatchLimits, Heartbeats
from expertmesh.experts.scaling_options import ScalingOptions
from expertmesh.router.failover import FailoverSettings
from expertmesh.router.replan import ReplanLimits
from expertmesh.router.selection_options import SelectionOptions
from expertmesh.runtime.channels import DEFAULT_MAX_MESSAGE_BYTES, GREATEST_MAX_MESSAGE_BYTES
from expertmesh.runtime.config import Settings
from expertmesh.runtime.connection_age import ConnectionAge
from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.missing_experts import Policy
from expertmesh.runtime.ports import PortRange
from expertmesh.runtime.security.redis_secrets import RedisSecrets, split_password
from expertmesh.runtime.security.settings import SecuritySettings

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PoolName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=40)]
Port = Annotated[int, Field(ge=0, le=65535)]


class RedisSettings(RedisSecrets):
    """Live state."""

    url: str | None = None
    """"redis://user@host:port/db" of a server of yours, or rediss:// with TLS; none starts an
    embedded one. A password in it is taken out, and treated as `password`."""
    password: SecretStr | None = Field(default=None, exclude=True)
    """The password; better not in a file that others read, and not on the command line."""

    @model_validator(mode="before")
    @classmethod
    def _take_password_out(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("url"), str):
            return values
        url, password = split_password(values["url"])
        if password is None:
            return values
        if values.get("password") is not None:
            raise ValueError("url, password: only one of them can have the password")
        return values | {"url": url, "password": password}

    def sources(self) -> list[str]:
        """See `RedisSecrets.sources`."""
        return [*(["password"] if self.password else []), *super().sources()]

    def read_password(self) -> str | None:
        """See `RedisSecrets.read_password`."""
        return self.password.get_secret_value() if self.password else super().read_password()

    def secrets(self) -> RedisSecrets:
        """What other processes may be told: where the password is, never the password.

        Raises:
            ConfigError: it is nowhere but here.
        """
        if self.password is not None:
            raise ConfigError("redis.password: put it into a file", field="redis.password")
        return RedisSecrets.model_validate(self.model_dump(exclude={"url"}))


class ScalingSettings(ScalingOptions):
    """More and fewer replicas by load (docs/scaling.md): each group by itself."""

    mode: Literal["off", "advisory", "on"] = "off"
    """"on" scales each group between `min_replicas` and `max_replicas`; "advisory" decides and
    tells, and leaves `experts.replicas`; "off" does nothing."""
    sample_s: float = Field(default=0.5, ge=0.1, le=10)
    """Time between two looks at the load; at most `up_window_s`."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.min_replicas:
            raise ValueError(
                "min_replicas: no other group could serve the experts of a group without replicas, "
                "so it is 1 or more"
            )
        if self.sample_s > self.up_window_s:
            raise ValueError(f"sample_s must be at most up_window_s, {self.up_window_s:g} s")
        return self


class PoolSettings(Settings):
    """Expert groups on machines of one kind."""

    groups: PositiveInt
    """Groups that the pool's experts are split into."""
    experts: str = ""
    """Experts of every layer that the pool holds, like "0-63"; "" is all. An expert may be in
    several pools: its rows then go where they are computed sooner."""
    shares: list[str | dict[int, str]] = Field(default=[])
    """What each group holds instead of an equal part of `experts`: ids like "0-15" of every layer,
    or by layer. `expertmesh k8s render` writes them."""
    replicas: PositiveInt = 1
    """Replicas of each group."""
    num_gpus: NonNegativeFloat | None = None
    """GPUs Ray reserves for a replica; none is `experts.num_gpus`."""
    label_selector: dict[str, str] = Field(default={})
    """Labels of the Ray nodes that the pool may use."""


class ExpertsSettings(Heartbeats):
    """The expert groups and their replicas."""

    groups: int = 4
    """Expert groups to split each layer's experts into: 1 to the number of experts."""
    replicas: PositiveInt = 1
    """Replicas of each group; with `scaling.mode: on` there are `scaling.min_replicas` at first."""
    max_replicas_per_node: PositiveInt | None = None
    """Replicas of a group on one Ray node at most; none is any number. 1: a lost node costs one."""
    pools: dict[PoolName, PoolSettings] = Field(default={})
    """Groups for several kinds of machines, by name, each with `groups`, `experts` or `shares`,
    `replicas`, `num_gpus` and `label_selector`; then `groups` and `replicas` above count for
    nothing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" computes on a GPU if Ray gave the replica one, else on the CPU."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs Ray reserves for a replica; fractions share a GPU."""
    num_cpus: NonNegativeFloat = 0.0
    """CPUs Ray reserves for a replica."""
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
    host: str = "127.0.0.1"
    """Address replicas listen on and announce; "" is each node's own."""
    ports: PortRange = ""
    """Ports replicas listen on, like "20000-20015": each takes the first free one of its address;
    "" lets the kernel choose."""
    local_socket: bool = True
    """Let routers of the same host and user call over a Unix socket instead of gRPC."""
    limits: BatchLimits = BatchLimits()
    """Queue and batch bounds."""
    scaling: ScalingSettings = ScalingSettings()
    """More and fewer replicas by load."""
    reject_nonfinite: bool = False
    """Answer rows with NaN or infinity with an error instead of computing them."""


class RouterSettings(ConnectionAge):
    """RouterService."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 50051
    """Port to listen on; 0 takes a free one."""
    drain_s: NonNegativeFloat = 10.0
    """Time running calls get to end when the process is told to stop."""
    call_timeout_s: PositiveFloat = 30.0
    """Time a call may take if its caller gives no deadline."""
    max_calls: PositiveInt = 1024
    """Calls worked on at the same time at most, and half of that by a lone caller; beyond it they
    get QueueFull."""
    max_calls_bytes: PositiveInt = 1 << 30
    """Bytes of the hidden states of these calls at most, shared alike."""


class SelectionSettings(SelectionOptions):
    """Which experts calls get that say nothing themselves (docs/routing.md): gateway and router."""

    exact_sample_frac: float = Field(default=0.01, ge=0, le=1)
    """Share of the layer calls that gave up gate mass which are computed exactly, too, to measure
    by how much their answers differ."""


class MissingExpertsSettings(Settings):
    """What calls that say nothing get when an expert has no live replica (docs/failures.md)."""

    policy: Policy = "strict"
    """"strict" fails; "substitute" takes the next-best live experts by the gate's scores;
    "renormalise" sums over the live ones. Answers say what was missing."""


class ControllerSettings(ReplanLimits):
    """Where copies of experts should be (docs/placement.md)."""

    mode: Literal["advisory", "execute"] = "advisory"
    """"advisory" plans and tells, and changes nothing; "execute" moves experts as well."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 50053
    """Port to listen on; 0 takes a free one."""
    window_s: PositiveFloat = 10.0
    """Time over which rows are counted before each plan."""
    lease_s: float = Field(default=5.0, ge=1)
    """Time after which another controller may take over from a silent one."""
    speeds: Literal["measured", "equal"] = "measured"
    """Whether replicas count as fast as the costs they report, or all as equally fast."""
    linger_s: PositiveFloat = 4.0
    """Time without rows for an expert after which a replica that gives it up frees it; at least
    what routers may take to hear of it."""
    step_timeout_s: PositiveFloat = 300.0
    """Time that loading or giving up one expert may take."""


class GatewaySettings(ConnectionAge):
    """The dense part of the model and GenerateService."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 50052
    """Port to listen on; 0 takes a free one."""
    drain_s: NonNegativeFloat = 10.0
    """Time running calls get to end when the gateway is told to stop."""
    engine: Literal["auto", "continuous", "exact"] = "auto"
    """"continuous" batches prompts; "exact" runs one at a time, as transformers' generate does;
    "auto" is continuous where the model supports it."""
    threads: PositiveInt = 1
    """Threads of the gateway's CPU matrix multiplications."""
    kv_cache_tokens: PositiveInt = 16384
    """Tokens of all running requests together whose keys and values continuous batching holds."""
    max_batch_tokens: PositiveInt = 1024
    """Tokens in one forward of continuous batching at most."""
    max_running: PositiveInt = 32
    """Requests in one batch of continuous batching at most."""
    max_waiting: NonNegativeInt = 256
    """Requests waiting for their turn at most; beyond it callers get QueueFull."""
    max_prompt_tokens: PositiveInt = 1 << 20
    """Tokens of the prompts running and waiting at most; beyond it callers get QueueFull."""
    stream_interval_s: NonNegativeFloat = 0.02
    """Tokens between an answer's first and last wait so long at most, to travel several in one
    message; none waits in requests with stop strings. 0 sends a message after each step."""
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
    """Share of the traces that begin here and are recorded, below 1 at most one a second for each
    process; a caller that sends a `traceparent` decides for itself."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Level of all logs."""
    redis: RedisSettings = RedisSettings()
    experts: ExpertsSettings = ExpertsSettings()
    router: RouterSettings = RouterSettings()
    gateway: GatewaySettings = GatewaySettings()
    controller: ControllerSettings = ControllerSettings()
    selection: SelectionSettings = SelectionSettings()
    failover: FailoverSettings = FailoverSettings()
    missing_experts: MissingExpertsSettings = MissingExpertsSettings()
    security: SecuritySettings = SecuritySettings()

    @model_validator(mode="after")
    def _deterministic_to_the_end(self) -> Self:
        if self.deterministic and self.gateway.engine == "continuous":
            raise ValueError(
                "gateway.engine: batching prompts changes bits, so a deterministic mesh takes "
                "'auto' or 'exact'"
            )
        if self.deterministic and not self.selection.is_exact:
            raise ValueError(
                "selection: experts selected by load change bits, so a deterministic mesh selects "
                "exactly: quality_budget, top_k and max_groups 0"
            )
        return self
