"""What a replica is made of whose device cannot hold all its experts. Composed here only."""

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import NamedTuple

import torch

from expertmesh.experts.arena import Arena, SlotPlan
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.experts.guesses import Guesses, NextGates
from expertmesh.experts.loader import ExpertLoader
from expertmesh.experts.loads import Fill
from expertmesh.experts.prefetch import CoActivation
from expertmesh.experts.reader import ExpertReader
from expertmesh.experts.residency import ExpertKey, Residency
from expertmesh.experts.sizing import check_holds_one
from expertmesh.experts.sources import CheckpointSource, HostCopies, Slowed
from expertmesh.experts.stack import allocate_on_host
from expertmesh.experts.swapped import SwappedFFN
from expertmesh.runtime.gate_names import gate_names

_HOST_HALF_LIFE_PER_EXPERT = 32.0
"""Host memory sees only what the device has not, which is rarely the same expert twice in a row."""


class Swapping(NamedTuple):
    """Layers, and the loader that brings their weights; it is not started."""

    layers: dict[int, SwappedFFN]
    loader: ExpertLoader


def swapping(
    reader: ExpertReader,
    plans: Mapping[ExpertKey, SlotPlan],
    budget_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
    args: ExpertGroupArgs,
) -> Swapping:
    """The layers of the experts planned for, under a budget that holds any one of them.

    Raises:
        ConfigError: `host_memory_bytes` is not 0 and holds no expert.
    """
    loader = ExpertLoader(
        Residency(_sizes(plans), budget_bytes),
        Arena(plans, budget_bytes, dtype, device),
        _source(reader, plans, dtype, device, args),
        device,
    )
    layers = sorted({key.layer for key in plans})
    gates = NextGates(layers, *_gates(reader, layers, dtype, device))
    guesses, lock = Guesses(CoActivation(layers), gates, plans.keys()), Lock()

    def likely(layer: int, experts: Sequence[int], rows_RD: torch.Tensor) -> Sequence[ExpertKey]:
        if not args.prefetch:
            return ()
        with (
            lock
        ):  # while a batch that nobody waits for any more ends, the event loop may begin one
            return guesses.after(layer, experts, rows_RD)

    return Swapping(
        {
            layer: SwappedFFN(layer, reader.spec, reader.expert_shape(layer), loader, likely)
            for layer in layers
        },
        loader,
    )


def _gates(
    reader: ExpertReader, layers: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[dict[int, torch.Tensor], int]:
    """([E, D] gate weights by layer, experts per token); only guesses depend on them, so what looks
    unusual is left out."""
    checkpoint = reader.checkpoint
    found: dict[int, torch.Tensor] = {}
    for layer, names in gate_names(checkpoint.names()).items():
        weights = names.get("gate weight", [])
        if layer not in layers or len(weights) != 1:
            continue
        shape = (reader.num_experts(layer), reader.expert_shape(layer).hidden_size)
        if tuple(checkpoint.shape(weights[0])) == shape:
            found[layer] = checkpoint.tensor(weights[0]).to(device, dtype)
    top_k = checkpoint.text_config.get("num_experts_per_tok")
    return found, top_k if isinstance(top_k, int) and top_k > 0 else 2


def _source(
    reader: ExpertReader,
    plans: Mapping[ExpertKey, SlotPlan],
    dtype: torch.dtype,
    device: torch.device,
    args: ExpertGroupArgs,
) -> Fill:
    fill: Fill = CheckpointSource(reader, dtype).fill
    sizes, budget_bytes = _sizes(plans), args.host_memory_bytes
    if budget_bytes:
        check_holds_one("experts.host_memory_bytes", budget_bytes, max(sizes.values()))
        allocate = allocate_on_host(pinned=device.type == "cuda")
        arena = Arena(plans, budget_bytes, dtype, torch.device("cpu"), allocate)
        half_life = _HOST_HALF_LIFE_PER_EXPERT * len(sizes)
        fill = HostCopies(Residency(sizes, budget_bytes, half_life), arena, fill).fill
    if args.simulated_load_bytes_per_s:
        fill = Slowed(fill, args.simulated_load_bytes_per_s).fill
    return fill


def _sizes(plans: Mapping[ExpertKey, SlotPlan]) -> dict[ExpertKey, int]:
    return {key: plan.num_bytes for key, plan in plans.items()}
