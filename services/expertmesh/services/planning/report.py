"""`expertmesh plan`: reads what a plan on paper is made of, and prints it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from expertmesh.experts.inspection import inspect_checkpoint
from expertmesh.experts.sizing import format_bytes
from expertmesh.runtime.hf_config import load_config
from expertmesh.services.checkpoints import model_dtype
from expertmesh.services.planning.paper import GpuPlan, LayerPlan, Model, PaperPlan

_MOST_LAYERS = 8
_BOX = box.SIMPLE_HEAD


def read_model(model_dir: str, dtype_name: str) -> Model:
    """From config and headers alone.

    Raises:
        CheckpointError: not a checkpoint we can serve.
    """
    report = inspect_checkpoint(model_dir)
    dtype = model_dtype(dtype_name, load_config(Path(model_dir)))
    return Model(
        report.expert_held_bytes(dtype), report.expert_parameters, report.num_experts, report.top_k
    )


def as_dict(plan: PaperPlan) -> dict[str, Any]:
    """For programs: every field, and what is computed from them."""
    values = dataclasses.asdict(plan)
    for layer, own in plan.layers.items():
        values["layers"][layer]["gap"] = own.gap
    values["cost_per_million_tokens"] = plan.cost_per_million_tokens
    return values


def render(plan: PaperPlan) -> None:
    """For people."""
    console = Console(highlight=False)
    console.print(_groups(plan.gpus))
    console.print(_layers(plan.layers))
    copies = sum(own.copies for own in plan.layers.values())
    experts = sum(own.experts for own in plan.layers.values())
    best = "measured" if plan.is_measured else "at most, by the GPUs' published peak rates"
    facts = {
        "copies": f"{copies} of {experts} experts",
        "tokens per s": f"{plan.tokens_per_s:.4g} in batches of {plan.batch_tokens} ({best})",
    }
    if plan.cost_per_million_tokens is not None:
        least = "" if plan.is_measured else ", at least"
        facts["price"] = f"{plan.price_per_hour:.4g} an hour"
        facts["cost"] = f"{plan.cost_per_million_tokens:.4g} per million tokens{least}"
    for name, value in facts.items():
        console.print(f"[bold]{name:14}[/] {escape(value)}")
    for note in plan.notes:
        console.print(escape(f"note: {note}"))


def _groups(gpus: Any) -> Table:
    table = Table("group", "GPU", "replicas", "experts", "memory of each", "rows", box=_BOX)
    groups: dict[str, list[GpuPlan]] = {}
    for gpu in gpus:
        groups.setdefault(gpu.group, []).append(gpu)
    for group, own in groups.items():
        first = own[0]
        memory = f"{format_bytes(first.expert_bytes)} of {format_bytes(first.usable_bytes)}"
        rows = f"{sum(gpu.rows_frac for gpu in own):.1%}"
        table.add_row(group, first.gpu, str(len(own)), _experts(first.experts), memory, rows)
    return table


def _experts(experts: Mapping[int, str]) -> str:
    kinds = set(experts.values())
    if len(kinds) == 1:
        return f"{kinds.pop()} of {len(experts)} layers"
    layer, ids = next(iter(experts.items()))
    return f"{ids} of layer {layer}, ..."


def _layers(layers: Mapping[int, LayerPlan]) -> Table:
    """The worst ones, if there are many."""
    title = "load, max/mean"
    if len(layers) > _MOST_LAYERS:
        title += f": the worst {_MOST_LAYERS} of {len(layers)} layers (--json has all)"
    table = Table("layer", "experts", "copies", "max/mean", "bound", "gap", title=title, box=_BOX)
    worst = sorted(layers, key=lambda layer: -layers[layer].max_over_mean)[:_MOST_LAYERS]
    for layer in sorted(worst):
        own = layers[layer]
        copies = f"{own.copies} (at most {own.most_copies} of one)"
        numbers = f"{own.max_over_mean:.3f}", f"{own.bound:.3f}", f"{own.gap:.1%}"
        table.add_row(str(layer), str(own.experts), copies, *numbers)
    return table
