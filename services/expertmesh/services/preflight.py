"""What can be known to be wrong before anything starts: checkpoint, family, groups, memory.

Read off headers and config.json without torch and transformers, whose imports would take longer
than everything else before Ray starts. What transformers itself refuses in a config, router and
gateway find out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from expertmesh.experts.assignment import experts_by_layer
from expertmesh.experts.reader import ExpertReader
from expertmesh.experts.sizing import check_holds_one, format_bytes, group_bytes
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.device import DeviceReading, probe_for
from expertmesh.runtime.errors import ConfigError, InsufficientMemory, UnsupportedCheckpoint
from expertmesh.runtime.telemetry import endpoint_url
from expertmesh.services.checkpoints import model_name
from expertmesh.services.pools import PlannedGroup, check_complete, planned_groups
from expertmesh.services.settings import ExpertsSettings, MeshSettings

_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class StartPlan:
    """What `serve` is about to start."""

    model: str
    num_experts: int
    """Experts per MoE layer, the most of any layer."""
    groups: tuple[PlannedGroup, ...]
    group_bytes: tuple[int, ...]
    """Weight bytes of one replica of each group."""
    summary: str


def check_before_start(settings: MeshSettings) -> StartPlan:
    """Reads headers and config only.

    Raises:
        CheckpointError: not a checkpoint we can serve.
        ConfigError: fewer groups than 1 or more than experts; a budget below one expert; more
            replicas of a group than may be on one machine.
        InsufficientMemory: the replicas do not fit this machine; says the numbers.
    """
    plan = plan_start(settings)
    _check_spread(plan, settings.experts)
    if settings.experts.device != "cuda" and not settings.experts.num_gpus:
        _check_machine(plan, probe_for("cpu").read(), settings.experts)
    return plan


def plan_start(settings: MeshSettings) -> StartPlan:
    """What the settings make of the checkpoint, on whatever machine. Raises as above, but for
    memory."""
    if settings.otlp_endpoint:
        endpoint_url(settings.otlp_endpoint)
    checkpoint = Checkpoint.open(settings.model)
    reader = ExpertReader(checkpoint)
    layers = {layer: reader.num_experts(layer) for layer in reader.layers()}
    num_experts = max(layers.values())
    value_bytes = _value_bytes(settings, checkpoint)
    groups = planned_groups(settings.experts, num_experts)
    check_complete(groups, layers)
    expert_bytes = {
        layer: reader.expert_shape(layer).num_parameters * value_bytes for layer in layers
    }
    sizes = tuple(
        group_bytes(expert_bytes, experts_by_layer(group.experts, layers)) for group in groups
    )
    for name in ("device_memory_bytes", "host_memory_bytes"):
        if asked_bytes := getattr(settings.experts, name):
            check_holds_one(f"experts.{name}", asked_bytes, max(expert_bytes.values()))
    name = model_name(settings)
    summary = (
        f"{name}: {checkpoint.model_type}, {len(layers)} MoE layers of {num_experts} experts, "
        f"{_described(groups)}, "
        f"{format_bytes(max(sizes))} of experts per replica"
    )
    return StartPlan(name, num_experts, tuple(groups), sizes, summary)


def _described(groups: Sequence[PlannedGroup]) -> str:
    replicas = {group.replicas for group in groups}
    if len(replicas) == 1:
        return f"{len(groups)} groups x {replicas.pop()} replicas"
    return f"{len(groups)} groups, {sum(group.replicas for group in groups)} replicas"


def _value_bytes(settings: MeshSettings, checkpoint: Checkpoint) -> int:
    name = checkpoint.dtype_name if settings.dtype == "auto" else settings.dtype
    if name not in _DTYPE_BYTES:
        raise UnsupportedCheckpoint(
            f"config.json: dtype {name!r} is not one to compute in; expected one of "
            f"{', '.join(_DTYPE_BYTES)}, or set `dtype`",
            dtype=name,
        )
    return _DTYPE_BYTES[name]


def _check_spread(plan: StartPlan, experts: ExpertsSettings) -> None:
    """Those that find no room would be waited for without end."""
    most, needed = experts.max_replicas_per_node, max(group.replicas for group in plan.groups)
    if most is not None and most < needed:
        raise ConfigError.of(
            "experts.max_replicas_per_node",
            expected=f"at least {needed}, the replicas of a group, as there is one machine here",
            got=most,
        )


def _check_machine(plan: StartPlan, device: DeviceReading, experts: ExpertsSettings) -> None:
    """All replicas share this machine's memory, so more groups would not help."""
    needed_bytes = sum(
        group.replicas * held_bytes(size, experts)
        for group, size in zip(plan.groups, plan.group_bytes, strict=True)
    )
    if needed_bytes <= device.free_bytes:
        return
    raise InsufficientMemory(
        f"{_described(plan.groups)} need {format_bytes(needed_bytes)} "
        f"for their experts, {device.name} has {format_bytes(device.free_bytes)} free. Use fewer "
        "replicas, a smaller dtype, more machines, or set `experts.device_memory_bytes`.",
        needed_bytes=needed_bytes,
        free_bytes=device.free_bytes,
        device=device.name,
    )


def held_bytes(group_bytes: int, experts: ExpertsSettings) -> int:
    """What one replica takes of the host: all its experts, or its two budgets."""
    budget_bytes = experts.device_memory_bytes
    if budget_bytes is None or budget_bytes >= group_bytes:
        return group_bytes
    return budget_bytes + min(experts.host_memory_bytes, group_bytes)
