"""What a checkpoint is and what would fit where, from headers and config alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from expertmesh.experts.assignment import experts_by_layer, split_evenly
from expertmesh.experts.inspection import CheckpointReport, inspect_checkpoint
from expertmesh.experts.sizing import HEADROOM_FRAC, format_bytes, group_bytes, min_num_groups
from expertmesh.router.families import routing_spec
from expertmesh.runtime.errors import ExpertMeshError
from expertmesh.runtime.hf_config import load_config
from expertmesh.services.checkpoints import model_dtype

DEVICES: Mapping[str, int] = {
    "L4 / RTX 4090 (24 GB)": 24 * 10**9,
    "A100 (40 GB)": 40 * 10**9,
    "L40S (48 GB)": 48 * 10**9,
    "A100 / H100 (80 GB)": 80 * 10**9,
    "H200 (141 GB)": 141 * 10**9,
}


@dataclass(frozen=True)
class ModelInspection:
    """A checkpoint, the groups asked for, and the devices that could hold them."""

    checkpoint: CheckpointReport
    dtype: str
    """In which the experts would be held."""
    held_bytes: int
    """All experts in that dtype."""
    groups: Mapping[str, int]
    """Expert ids of each group -> bytes of one replica."""
    groups_needed: Mapping[str, int | None]
    """Device -> the fewest groups that fit one device each; None if one expert does not fit."""
    forward: str
    """"yes", or why the router cannot own this family's gate."""


def inspect_model(model_dir: str, num_groups: int, dtype_name: str) -> ModelInspection:
    """Reads headers and config; loads nothing.

    Raises:
        CheckpointError: not a checkpoint we can serve.
        ConfigError: fewer groups than 1 or more than experts.
    """
    report = inspect_checkpoint(model_dir)
    config = load_config(Path(model_dir))
    dtype = model_dtype(dtype_name, config)
    expert_bytes = report.expert_held_bytes(dtype)
    num_experts = report.num_experts
    ranges = split_evenly(max(num_experts.values()), num_groups)
    sizes = {ids: group_bytes(expert_bytes, experts_by_layer(ids, num_experts)) for ids in ranges}
    usable = {name: int(size * (1 - HEADROOM_FRAC)) for name, size in DEVICES.items()}
    return ModelInspection(
        checkpoint=report,
        dtype=str(dtype).removeprefix("torch."),
        held_bytes=sum(expert_bytes[layer] * count for layer, count in num_experts.items()),
        groups=sizes,
        groups_needed={
            name: min_num_groups(expert_bytes, num_experts, size) for name, size in usable.items()
        },
        forward=_forward(config, next(iter(num_experts))),
    )


def _forward(config: Any, layer: int) -> str:
    try:
        routing_spec(config, layer)
    except ExpertMeshError as error:
        return error.message
    return "yes"


def render(found: ModelInspection) -> None:
    """Print the report for people."""
    console = Console(highlight=False)
    report = found.checkpoint
    layers = sorted(report.num_experts)
    facts = {
        "architecture": f"{report.architecture} ({report.model_type})",
        "experts on disk": f"{report.layout}, {report.disk_dtype}",
        "layers": f"{report.num_layers}, of which {len(layers)} with experts",
        "routing": f"{max(report.num_experts.values())} experts, {report.top_k} per token",
        "sizes": f"hidden {report.hidden_size}, expert FFN {report.ffn_size}",
        "total on disk": format_bytes(report.total_bytes),
        "dense part": f"{format_bytes(report.dense_bytes)} (the gateway's)",
        "experts": f"{format_bytes(report.expert_bytes)} on disk, "
        f"{format_bytes(found.held_bytes)} held in {found.dtype}",
        "one expert": format_bytes(max(report.expert_disk_bytes.values())) + " on disk",
        "router Forward": found.forward,
    }
    for name, value in facts.items():
        console.print(f"[bold]{name:16}[/] {escape(value)}")
    table = Table("group", "experts of every layer", "bytes of a replica")
    for index, (ids, size) in enumerate(found.groups.items()):
        table.add_row(f"g{index}", ids, format_bytes(size))
    console.print(table)
    fits = Table("device of each group", f"fewest groups ({HEADROOM_FRAC:.0%} of memory left free)")
    for name, needed in found.groups_needed.items():
        fits.add_row(name, str(needed) if needed else "not even one expert per layer fits")
    console.print(fits)
