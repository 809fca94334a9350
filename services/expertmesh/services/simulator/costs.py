"""What virtual replicas cost: from the GPU's data sheet and the model's sizes. Pure.

A batch takes batch_us + expert_us * (experts in it) + row_us * (rows), the form that real replicas
fit to their batches (`experts/cost_fit.py`): an expert's weights are read once, every row is
computed. The two overlap on a real GPU, so this is more than it takes there.
"""

import math
from collections.abc import Sequence

from expertmesh.router.pools import Costs
from expertmesh.runtime.errors import InsufficientMemory
from expertmesh.services.gpus import Gpu, parse_gpus
from expertmesh.services.simulator.scenario import CostSettings, MeshSettings, ModelSettings


def gpu_costs(gpu: Gpu, first: Gpu, model: ModelSettings, costs: CostSettings) -> Costs:
    """Of a replica on a GPU.

    Args:
        first: of speed 1, where costs are given in microseconds.
    """
    expert_us = 1e6 * model.expert_bytes / (gpu.bandwidth_bytes_per_s * costs.bandwidth_frac)
    row_us = 1e6 * model.row_flops / (gpu.flops_per_s * costs.flops_frac)
    if costs.expert_us is not None:
        expert_us = costs.expert_us * first.bandwidth_bytes_per_s / gpu.bandwidth_bytes_per_s
    if costs.row_us is not None:
        row_us = costs.row_us * first.flops_per_s / gpu.flops_per_s
    return Costs(costs.batch_us, expert_us, row_us)


def replica_costs(mesh: MeshSettings, model: ModelSettings) -> Sequence[Costs]:
    """Of the GPUs that replicas get, one after the other.

    Raises:
        ConfigError: an unknown GPU.
        InsufficientMemory: a group does not fit one of them.
    """
    gpus = parse_gpus(mesh.gpus)
    experts = math.ceil((model.experts + mesh.spare_slots) / mesh.groups)
    needed = int(experts * model.layers * model.expert_bytes)
    smallest = min(gpus, key=lambda gpu: gpu.memory_bytes)
    if needed > smallest.memory_bytes:
        raise InsufficientMemory(
            f"mesh.groups: a group of {experts} experts in {model.layers} layers takes "
            f"{needed / 1e9:.1f} GB, {smallest.name} has {smallest.memory_bytes / 1e9:.0f} GB; "
            f"{(needed - smallest.memory_bytes) / 1e9:.1f} GB are missing. Make more groups, or "
            "take larger GPUs.",
            field="mesh.groups",
            missing_bytes=needed - smallest.memory_bytes,
        )
    return [gpu_costs(gpu, gpus[0], model, mesh.costs) for gpu in gpus]
