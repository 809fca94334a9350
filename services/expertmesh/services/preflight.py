"""What can be known to be wrong before anything starts: checkpoint, family, groups, memory."""

from dataclasses import dataclass
from pathlib import Path

from expertmesh.experts.assignment import experts_by_layer, split_evenly
from expertmesh.experts.reader import ExpertReader
from expertmesh.experts.sizing import format_bytes, group_bytes
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.device import DeviceReading, probe_for
from expertmesh.runtime.errors import InsufficientMemory
from expertmesh.runtime.hf_config import load_config
from expertmesh.runtime.telemetry import endpoint_url
from expertmesh.services.checkpoints import model_dtype, model_name
from expertmesh.services.settings import ExpertsSettings, MeshSettings


@dataclass(frozen=True)
class StartPlan:
    """What `serve` is about to start."""

    model: str
    num_experts: int
    """Experts per MoE layer, the most of any layer."""
    group_bytes: tuple[int, ...]
    """Weight bytes of one replica of each group."""
    summary: str


def check_before_start(settings: MeshSettings) -> StartPlan:
    """Reads headers and config only.

    Raises:
        CheckpointError: not a checkpoint we can serve.
        ConfigError: fewer groups than 1 or more than experts.
        InsufficientMemory: the replicas do not fit this machine; says the numbers.
    """
    if settings.otlp_endpoint:
        endpoint_url(settings.otlp_endpoint)
    path = Path(settings.model)
    checkpoint = Checkpoint.open(path)
    config = load_config(path)
    reader = ExpertReader(checkpoint)
    layers = {layer: reader.num_experts(layer) for layer in reader.layers()}
    num_experts = max(layers.values())
    dtype = model_dtype(settings.dtype, config)
    ranges = split_evenly(num_experts, settings.experts.groups)
    expert_bytes = {layer: reader.expert_bytes(layer, dtype) for layer in layers}
    sizes = tuple(group_bytes(expert_bytes, experts_by_layer(ids, layers)) for ids in ranges)
    if settings.experts.device != "cuda" and not settings.experts.num_gpus:
        device = probe_for("cpu").read()
        needed_bytes = sum(sizes) * settings.experts.replicas
        _check_machine(needed_bytes, device, settings.experts)
    name = model_name(settings)
    text = config.get_text_config()
    summary = (
        f"{name}: {text.model_type}, {len(layers)} MoE layers of {num_experts} experts, "
        f"{settings.experts.groups} groups x {settings.experts.replicas} replicas, "
        f"{format_bytes(max(sizes))} of experts per replica"
    )
    return StartPlan(name, num_experts, sizes, summary)


def _check_machine(needed_bytes: int, device: DeviceReading, experts: ExpertsSettings) -> None:
    """All replicas share this machine's memory, so more groups would not help."""
    if needed_bytes <= device.free_bytes:
        return
    raise InsufficientMemory(
        f"{experts.groups} groups x {experts.replicas} replicas need {format_bytes(needed_bytes)} "
        f"for their experts, {device.name} has {format_bytes(device.free_bytes)} free. Use fewer "
        "replicas, a smaller dtype, or more machines.",
        needed_bytes=needed_bytes,
        free_bytes=device.free_bytes,
        device=device.name,
    )
