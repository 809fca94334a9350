"""An overlay for a model on given GPUs, written into a directory."""

import os
from collections.abc import Sequence
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
from expertmesh.services.k8s.sizing import ModelSizes, pools_for
from expertmesh.services.ray_service import serve_config_of
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
    unused_gpus: int


def render(model_dir: str, gpus: Sequence[Gpu], base: Path, out: Path, dtype: str) -> Rendered:
    """Read headers, decide, write.

    Args:
        base: the checkout's `k8s/base`.
        out: the overlay's directory; files of the same names are replaced.

    Raises:
        CheckpointError, ConfigError, InsufficientMemory: names the field; nothing is written.
    """
    template, base_values = _read_base(base)
    sizes, name = model_sizes(model_dir, dtype), Path(model_dir).resolve().name
    pools = pools_for(sizes, gpus)
    values = mesh_values(base_values, name, pools)
    if dtype != "auto":
        values["dtype"] = dtype
    settings = validate(MeshSettings, values)
    relative = os.path.relpath(base.resolve(), out.resolve())
    overlay = Overlay(name, sizes, pools, settings, relative)
    texts = {file: _HEADER + _dump(content) for file, content in files(overlay, template).items()}
    texts["mesh.yaml"] = _MESH_HEADER + _dump(values)
    texts["serve.yaml"] = _HEADER + serve_config_of(settings, sizes.num_experts)
    out.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (out / file).write_text(text, encoding="utf-8")
    return Rendered(out, overlay, len(gpus) - sum(pool.num_gpus for pool in pools.values()))


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
    held_bytes = report.expert_held_bytes(dtype)
    return ModelSizes(
        num_experts=max(report.num_experts.values()),
        expert_bytes=sum(held_bytes.values()),
        dense_bytes=report.dense_bytes,
        kv_token_bytes=kv_token_bytes(config.get_text_config(), dtype),
        gate_bytes=sum(report.num_experts.values()) * report.hidden_size * 4,
        total_bytes=report.total_bytes,
    )
