"""From the arguments of a group to its experts in memory.

R rows, D hidden size.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from expertmesh.experts.arena import SlotPlan, slot_plans
from expertmesh.experts.assignment import experts_by_layer
from expertmesh.experts.batch import PackedRows
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.experts.ffn import ExpertFFN
from expertmesh.experts.invariance import ignores_row_count
from expertmesh.experts.loader import ExpertLoader
from expertmesh.experts.reader import ExpertReader, ExpertShape
from expertmesh.experts.residency import ExpertKey
from expertmesh.experts.sizing import device_budget, group_bytes
from expertmesh.experts.swapped import SwappedFFN
from expertmesh.experts.swapping import swapping
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.device import probe_for
from expertmesh.runtime.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedExperts:
    """The experts of one replica, ready to compute."""

    layers: dict[int, ExpertFFN | SwappedFFN]
    experts: dict[int, tuple[int, ...]]
    """Expert ids held, by layer."""
    reader: ExpertReader
    expert_bytes: Mapping[int, int]
    """Bytes of one expert, of every layer of the model."""
    dtype: torch.dtype
    device: torch.device
    hidden_size: int
    may_merge: bool
    """Whether rows of different callers may share a matrix product."""
    loader: ExpertLoader | None = None
    """Brings weights to the device, if it cannot hold them all."""

    @property
    def weight_bytes(self) -> int:
        """Of all experts held."""
        return group_bytes(self.expert_bytes, self.experts)

    def is_ready(self, layer: int, experts: Sequence[int]) -> bool:
        """Whether the experts can be computed without waiting for their weights."""
        if self.loader is None:
            return True
        return self.loader.are_resident([ExpertKey(layer, expert) for expert in experts])

    def experts_to_try(self, num_experts: int) -> tuple[int, tuple[int, ...]]:
        """A layer and at most so many of its experts, ascending: some that are on the device, so
        that trying them moves nothing, if there are any."""
        if self.loader:
            with self.loader.locked() as residency:
                if favourite := residency.favourite():
                    layer = favourite.layer
                    others = (
                        k.expert for k in residency.resident - {favourite} if k.layer == layer
                    )
                    chosen = [favourite.expert, *others][:num_experts]
                    return layer, tuple(sorted(chosen))
        layer, experts = min(self.experts.items())
        return layer, experts[:num_experts]

    def set_budget(self, budget_bytes: int | None) -> None:
        """Change the device's budget for weights; None is the one from the start.

        Raises:
            ConfigError: all experts are held, or the budget does not hold one.
        """
        if self.loader:
            self.loader.set_budget(budget_bytes)
        elif budget_bytes:
            raise ConfigError.of(
                "device_memory_bytes",
                expected="none, as this replica was started to hold all its experts",
                got=budget_bytes,
                hint="Set experts.device_memory_bytes; that restarts it.",
            )

    def close(self) -> None:
        """Stop loading."""
        if self.loader:
            self.loader.close()

    def compute(self, rows: PackedRows) -> torch.Tensor:
        """Outputs [R, D] on the CPU, unweighted, in the order of the rows."""
        layer = self.layers[rows.layer]
        if self.device.type == "cpu":  # `to` is 1 us even where it does nothing
            return layer.forward(rows.rows_RD, rows.experts, rows.rows_per_expert)
        rows_RD = rows.rows_RD.to(self.device)
        return layer.forward(rows_RD, rows.experts, rows.rows_per_expert).to("cpu")


def load_experts(args: ExpertGroupArgs) -> LoadedExperts:
    """Read the group's experts, and nothing else of the checkpoint, into the device's memory; if it
    cannot hold them all, they are read when they are needed.

    Raises:
        CheckpointError: the directory is no checkpoint we can serve.
        InsufficientMemory: the device has too little memory; said before anything is loaded.
        ConfigError: experts the model does not have, or `device_memory_bytes` below one of them.
    """
    started_s = time.monotonic()
    checkpoint = Checkpoint.open(args.model_dir)
    reader = ExpertReader(checkpoint)
    sizes = {layer: reader.num_experts(layer) for layer in reader.layers()}
    held = experts_by_layer(args.experts, sizes)
    dtype, device = compute_dtype(args.dtype, checkpoint), compute_device(args.device)
    expert_bytes = {layer: reader.expert_bytes(layer, dtype) for layer in sizes}
    weight_bytes = group_bytes(expert_bytes, held)
    plans = slot_plans(reader, held, dtype)
    budget_bytes = _budget_bytes(args, weight_bytes, plans, device)
    layers: dict[int, ExpertFFN | SwappedFFN] = {}
    loader = None
    if budget_bytes is None:
        layers |= {
            layer: ExpertFFN.load(reader, layer, own, reader.spec, dtype, device)
            for layer, own in held.items()
        }
    else:
        swapped, loader = swapping(reader, plans, budget_bytes, dtype, device, args)
        layers |= swapped
        loader.start()
    took_s = time.monotonic() - started_s
    logger.info("%s: %.1f MiB of experts in %.2f s", args.group, weight_bytes / 2**20, took_s)
    if budget_bytes is not None:
        logger.info("%s: %.1f MiB of them at a time", args.group, budget_bytes / 2**20)
    shape = next(iter(layers.values())).shape
    merge = not args.deterministic or _may_merge(shape, dtype, device)
    return LoadedExperts(
        layers,
        held,
        reader,
        expert_bytes,
        dtype,
        device,
        shape.hidden_size,
        merge,
        loader,
    )


def _budget_bytes(
    args: ExpertGroupArgs,
    weight_bytes: int,
    plans: Mapping[ExpertKey, SlotPlan],
    device: torch.device,
) -> int | None:
    reading = probe_for(device.type).read()
    return device_budget(
        args.group,
        args.device_memory_bytes,
        weight_bytes,
        max(plan.num_bytes for plan in plans.values()),
        reading.free_bytes,
        reading.name,
    )


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
