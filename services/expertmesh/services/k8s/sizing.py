"""How a model's experts are spread over kinds of GPUs, and what its Pods need. Pure.

One GPU per replica, as a Pod with one GPU is what Kubernetes can place and Ray can take away again.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from expertmesh.experts.sizing import HEADROOM_FRAC, format_bytes
from expertmesh.runtime.errors import InsufficientMemory
from expertmesh.services.gpus import Gpu
from expertmesh.services.settings import PoolSettings

GIB = 1 << 30
GATEWAY_OVERHEAD_BYTES = 500 << 20
ROUTER_OVERHEAD_BYTES = 280 << 20
REPLICA_OVERHEAD_BYTES = 350 << 20
RAY_OVERHEAD_BYTES = 730 << 20
"""Measured resident sets: docs/operations.md, "Memory"."""
CUDA_BYTES = 3 * GIB
"""Host memory of a process that uses a GPU; an estimate, as nothing here was run on one."""
_MARGIN_FRAC = 0.25


@dataclass(frozen=True)
class ModelSizes:
    """What is known of a model before it runs."""

    num_experts: int
    """Of an MoE layer, the most of any layer."""
    expert_bytes: int
    """Of one expert id in all layers, as the device holds it."""
    dense_bytes: int
    """What the gateway holds."""
    kv_token_bytes: int
    """Keys and values of one token in all layers."""
    gate_bytes: int
    """Of all gates."""
    total_bytes: int
    """Of the checkpoint on disk."""


@dataclass(frozen=True)
class GpuPool:
    """Groups on GPUs of one kind."""

    gpu: Gpu
    num_gpus: int
    """Of which this many are used."""
    settings: PoolSettings


@dataclass(frozen=True)
class _Kind:
    gpu: Gpu
    num: int
    ids_each: int
    """Expert ids that fit one GPU."""

    @property
    def capacity(self) -> int:
        return self.num * self.ids_each


def pools_for(model: ModelSizes, gpus: Sequence[Gpu]) -> dict[str, GpuPool]:
    """A pool for each kind of GPU, by its name.

    A kind that can hold all experts does. If no kind can, each holds a share by its memory; if some
    can, the others hold as many as fit, as copies.

    Raises:
        InsufficientMemory: all GPUs together do not hold the experts; says the numbers.
    """
    counts = Counter(gpu.name for gpu in gpus)
    by_name = {gpu.name: gpu for gpu in gpus}
    kinds = [
        _Kind(by_name[name], num, _ids_each(model, by_name[name])) for name, num in counts.items()
    ]
    kinds = [kind for kind in kinds if kind.ids_each]
    _check_capacity(model, kinds, gpus)
    if not any(kind.capacity >= model.num_experts for kind in kinds):
        return _shared_out(model, kinds)
    return {kind.gpu.name: _whole_or_copies(model, kind) for kind in kinds}


def _ids_each(model: ModelSizes, gpu: Gpu) -> int:
    return int(gpu.memory_bytes * (1 - HEADROOM_FRAC)) // model.expert_bytes


def _check_capacity(model: ModelSizes, kinds: Sequence[_Kind], gpus: Sequence[Gpu]) -> None:
    if sum(kind.capacity for kind in kinds) >= model.num_experts:
        return
    needed_bytes = model.num_experts * model.expert_bytes
    free_bytes = int(sum(gpu.memory_bytes for gpu in gpus) * (1 - HEADROOM_FRAC))
    raise InsufficientMemory(
        f"--gpus: the model's experts need {format_bytes(needed_bytes)}, these GPUs have "
        f"{format_bytes(free_bytes)} for them. Take more or larger ones, or a smaller dtype.",
        field="--gpus",
        needed_bytes=needed_bytes,
        free_bytes=free_bytes,
    )


def _whole_or_copies(model: ModelSizes, kind: _Kind) -> GpuPool:
    if kind.capacity < model.num_experts:
        return _pool(kind, f"0-{kind.capacity - 1}", kind.num, 1)
    fewest = -(-model.num_experts // kind.ids_each)
    most = min(kind.num, model.num_experts)
    # the fewest groups of those that leave the fewest GPUs idle
    groups = max(range(fewest, most + 1), key=lambda num: (num * (kind.num // num), -num))
    return _pool(kind, "", groups, kind.num // groups)


def _shared_out(model: ModelSizes, kinds: Sequence[_Kind]) -> dict[str, GpuPool]:
    """Contiguous ids for each kind, in proportion to what it holds."""
    pools, first = {}, 0
    left, room = model.num_experts, sum(kind.capacity for kind in kinds)
    for kind in kinds:
        own = min(kind.capacity, -(-left * kind.capacity // room))
        left, room = left - own, room - kind.capacity
        if own:
            groups = min(kind.num, own)
            pools[kind.gpu.name] = _pool(kind, f"{first}-{first + own - 1}", groups, 1)
        first += own
    return pools


def _pool(kind: _Kind, experts: str, groups: int, replicas: int) -> GpuPool:
    settings = PoolSettings(
        groups=groups,
        experts=experts,
        replicas=replicas,
        num_gpus=1,
        label_selector={"expertmesh/pool": kind.gpu.name},
    )
    return GpuPool(kind.gpu, groups * replicas, settings)


def gateway_bytes(model: ModelSizes, kv_cache_tokens: int) -> int:
    """Memory of a gateway Pod."""
    held_bytes = model.dense_bytes + kv_cache_tokens * model.kv_token_bytes
    return _rounded(GATEWAY_OVERHEAD_BYTES + held_bytes)


def router_bytes(model: ModelSizes) -> int:
    """Memory of a router Pod."""
    return _rounded(ROUTER_OVERHEAD_BYTES + model.gate_bytes)


def worker_bytes(host_memory_bytes: int, cpu_bytes: int = 0, replicas: int = 1) -> int:
    """Memory of a Pod of replicas.

    Args:
        host_memory_bytes: `experts.host_memory_bytes`.
        cpu_bytes: experts of all its replicas, if they compute on the CPU; 0 for a GPU.
    """
    own_bytes = RAY_OVERHEAD_BYTES + replicas * (REPLICA_OVERHEAD_BYTES + host_memory_bytes)
    return _rounded(own_bytes + (cpu_bytes or CUDA_BYTES))


def volume_bytes(model: ModelSizes) -> int:
    """Size of a volume for the checkpoint."""
    return _rounded(model.total_bytes)


def _rounded(num_bytes: int) -> int:
    """A quarter more, in whole GiB."""
    return -(-int(num_bytes * (1 + _MARGIN_FRAC)) // GIB) * GIB
