"""An overlay for a model on given GPUs, written into a directory."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from expertmesh.experts.inspection import inspect_checkpoint
from expertmesh.runtime.config import validate
from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.hf_config import load_config
from expertmesh.services.checkpoints import kv_token_bytes, model_dtype
from expertmesh.services.gpus import Gpu
from expertmesh.services.k8s.overlay import Overlay, files, mesh_values
from expertmesh.services.k8s.placing import place
from expertmesh.services.k8s.pools import pools_of
from expertmesh.services.k8s.sizing import ModelSizes
from expertmesh.services.planning.paper import GpuPlan
from expertmesh.services.planning.popularity import read_popularity
from expertmesh.services.planning.report import read_model
from expertmesh.services.ray_service import plan_for, serve_config_of
from expertmesh.services.settings import MeshSettings

_MESH_HEADER = """\
# Made by `expertmesh k8s render`. After a change, make serve.yaml anew with
#   expertmesh k8s serve-config --config mesh.yaml CHECKPOINT > serve.yaml
"""
_HEADER = "# Made by `expertmesh k8s render`.\n"


@dataclass(frozen=True)
class Rendered:
    """What was written."""

    directory: Path
    overlay: Overlay
    gpus: Sequence[GpuPlan]
    """What would be where."""
    num_experts: Mapping[int, int]
    """Layer -> its experts."""
    notes: Sequence[str]
    """What the plan assumes."""


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    model_dir: str
    gpus: Sequence[Gpu]
    base: Path
    """The checkout's `k8s/base`."""
    out: Path
    """The overlay's directory; files of the same names are replaced."""
    dtype: str
    """Of the experts."""
    batch_tokens: int
    """Tokens that go through a layer together."""
    popularity: Path | None
    """CSV of each expert's rows; none counts all alike."""


def render(request: Request) -> Rendered:
    """Read headers, plan, write.

    Raises:
        CheckpointError, ConfigError, InsufficientMemory: names the field; nothing is written.
    """
    template, base_values = _read_base(request.base)
    model = read_model(request.model_dir, request.dtype)
    rows = read_popularity(request.popularity, model.num_experts) if request.popularity else None
    gpus, notes = place(model, request.gpus, rows, request.batch_tokens)
    name, pools = Path(request.model_dir).resolve().name, pools_of(gpus, len(model.num_experts))
    values = mesh_values(base_values, name, pools)
    if request.dtype != "auto":
        values["dtype"] = request.dtype
    settings = validate(MeshSettings, values)
    num_experts = plan_for(settings, request.model_dir).num_experts
    relative = os.path.relpath(request.base.resolve(), request.out.resolve())
    sizes = model_sizes(request.model_dir, request.dtype)
    overlay = Overlay(name, sizes, pools, settings, relative)
    texts = {file: _HEADER + _dump(content) for file, content in files(overlay, template).items()}
    texts["mesh.yaml"] = _MESH_HEADER + _dump(values)
    texts["serve.yaml"] = _HEADER + serve_config_of(settings, num_experts)
    request.out.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (request.out / file).write_text(text, encoding="utf-8")
    return Rendered(request.out, overlay, gpus, model.num_experts, notes)


def _read_base(base: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        documents = list(yaml.safe_load_all((base / "rayservice.yaml").read_text("utf-8")))
        values: dict[str, Any] = yaml.safe_load((base / "mesh.yaml").read_text("utf-8"))
    except OSError as error:
        raise ConfigError.of(
            "--base",
            expected="k8s/base of a checkout of expertmesh",
            got=f"{base}: {error.strerror}",
        ) from error
    [template] = [document for document in documents if document["kind"] == "RayService"]
    return template, values


def _dump(content: Any) -> str:
    if isinstance(content, list):
        return yaml.safe_dump_all(content, sort_keys=False)
    return yaml.safe_dump(content, sort_keys=False)


def model_sizes(model_dir: str, dtype_name: str) -> ModelSizes:
    """Sizes by headers and config.

    Raises:
        CheckpointError: not a checkpoint we can serve.
    """
    report = inspect_checkpoint(model_dir)
    config = load_config(model_dir)
    dtype = model_dtype(dtype_name, config)
    return ModelSizes(
        dense_bytes=report.dense_bytes,
        kv_token_bytes=kv_token_bytes(config.get_text_config(), dtype),
        gate_bytes=sum(report.num_experts.values()) * report.hidden_size * 4,
        total_bytes=report.total_bytes,
    )
