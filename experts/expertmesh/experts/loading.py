"""From the arguments of a group to its experts in memory.

R rows, D hidden size.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from expertmesh.experts.assignment import experts_by_layer
from expertmesh.experts.batch import PackedRows
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.experts.ffn import ExpertFFN
from expertmesh.experts.invariance import ignores_row_count
from expertmesh.experts.reader import ExpertReader, ExpertShape
from expertmesh.experts.sizing import check_fits, group_bytes
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.device import probe_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedExperts:
    """The experts of one replica, ready to compute."""

    layers: Mapping[int, ExpertFFN]
    experts: Mapping[int, tuple[int, ...]]
    """Expert ids held, by layer."""
    dtype: torch.dtype
    device: torch.device
    hidden_size: int
    weight_bytes: int
    may_merge: bool
    """Whether rows of different callers may share a matrix product."""

    def compute(self, rows: PackedRows) -> torch.Tensor:
        """Outputs [R, D] on the CPU, unweighted, in the order of the rows."""
        rows_RD = rows.rows_RD.to(self.device)
        outputs_RD = self.layers[rows.layer].forward(rows_RD, rows.experts, rows.rows_per_expert)
        return outputs_RD.to("cpu")


def load_experts(args: ExpertGroupArgs) -> LoadedExperts:
    """Read the group's experts, and nothing else of the checkpoint, into the device's memory.

    Raises:
        CheckpointError: the directory is no checkpoint we can serve.
        InsufficientMemory: they do not fit; said before anything is loaded.
        ConfigError: experts the model does not have.
    """
    started_s = time.monotonic()
    checkpoint = Checkpoint.open(args.model_dir)
    reader = ExpertReader(checkpoint)
    sizes = {layer: reader.num_experts(layer) for layer in reader.layers()}
    held = experts_by_layer(args.experts, sizes)
    dtype, device = compute_dtype(args.dtype, checkpoint), compute_device(args.device)
    expert_bytes = {layer: reader.expert_bytes(layer, dtype) for layer in held}
    weight_bytes = group_bytes(expert_bytes, held)
    reading = probe_for(device.type).read()
    check_fits(args.group, weight_bytes, reading.free_bytes, reading.name)
    layers = {
        layer: ExpertFFN.load(reader, layer, own, reader.spec, dtype, device)
        for layer, own in held.items()
    }
    took_s = time.monotonic() - started_s
    logger.info("%s: %.1f MiB of experts in %.2f s", args.group, weight_bytes / 2**20, took_s)
    shape = next(iter(layers.values())).shape
    merge = not args.deterministic or _may_merge(shape, dtype, device)
    return LoadedExperts(layers, held, dtype, device, shape.hidden_size, weight_bytes, merge)


def _may_merge(shape: ExpertShape, dtype: torch.dtype, device: torch.device) -> bool:
    """In deterministic mode only if it leaves every row's bits as they are."""
    num_up = shape.ffn_size * (2 if shape.gated else 1)
    products = [(shape.hidden_size, num_up), (shape.ffn_size, shape.hidden_size)]
    return ignores_row_count(dtype, device, products)


def compute_dtype(name: str, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype called `name`; "auto" is the checkpoint's own, as transformers takes it."""
    if name == "auto":
        configs = (checkpoint.text_config, checkpoint.config)
        names = [c.get("dtype") or c.get("torch_dtype") for c in configs]
        name = next((own for own in names if own), "float32")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def compute_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU Ray gave this process, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
