"""Pools of expert groups from a plan on paper. Pure.

One GPU per replica, as a Pod with one GPU is what Kubernetes can place and Ray can take away again.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expertmesh.services.planning.paper import GpuPlan
from expertmesh.services.pools import Share
from expertmesh.services.settings import PoolSettings


@dataclass(frozen=True)
class GpuPool:
    """Groups on GPUs of one kind."""

    gpu: str
    num_gpus: int
    """As many as hold experts."""
    settings: PoolSettings
    expert_bytes: int
    """Of the fullest GPU."""
    usable_bytes: int
    """Of each: its memory less the headroom."""
    rows_frac: float
    """Their share of all rows."""


def pools_of(gpus: Sequence[GpuPlan], num_layers: int) -> dict[str, GpuPool]:
    """A pool for each kind of GPU that holds experts, by its name.

    Args:
        num_layers: MoE layers of the model.
    """
    kinds: dict[str, list[GpuPlan]] = {}
    for gpu in gpus:
        if gpu.experts:
            kinds.setdefault(gpu.gpu, []).append(gpu)
    return {name: _pool(name, own, num_layers) for name, own in kinds.items()}


def _pool(name: str, gpus: Sequence[GpuPlan], num_layers: int) -> GpuPool:
    """GPUs that hold the same are replicas of a group, if all groups have as many."""
    held = Counter(gpu.group for gpu in gpus)
    if len(set(held.values())) == 1:
        groups = list({gpu.group: gpu for gpu in gpus}.values())
    else:
        groups = list(gpus)
    settings = PoolSettings(
        groups=len(groups),
        shares=[_share(gpu.experts, num_layers) for gpu in groups],
        replicas=len(gpus) // len(groups),
        num_gpus=1,
        label_selector={"expertmesh/pool": name},
    )
    most_bytes = max(gpu.expert_bytes for gpu in gpus)
    rows_frac = sum(gpu.rows_frac for gpu in gpus)
    return GpuPool(name, len(gpus), settings, most_bytes, gpus[0].usable_bytes, rows_frac)


def _share(experts: Mapping[int, str], num_layers: int) -> Share:
    """Short, if all layers are alike."""
    kinds = set(experts.values())
    return kinds.pop() if len(kinds) == 1 and len(experts) == num_layers else dict(experts)
