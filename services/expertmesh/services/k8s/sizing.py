"""What the Pods of a model need, and why. Pure."""

from dataclasses import dataclass

from expertmesh.experts.sizing import format_bytes

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
    """What is known of a model before it runs, beside its experts."""

    dense_bytes: int
    """What the gateway holds."""
    kv_token_bytes: int
    """Keys and values of one token in all layers."""
    gate_bytes: int
    """Of all gates."""
    total_bytes: int
    """Of the checkpoint on disk."""


@dataclass(frozen=True)
class Need:
    """Bytes that a Pod or volume asks for, by what they are for."""

    parts: dict[str, int]

    @property
    def num_bytes(self) -> int:
        """A quarter more, in whole GiB."""
        return -(-int(sum(self.parts.values()) * (1 + _MARGIN_FRAC)) // GIB) * GIB

    def __str__(self) -> str:
        parts = " + ".join(f"{name} {format_bytes(size)}" for name, size in self.parts.items())
        return f"{self.num_bytes // GIB} GiB: {parts}, and a quarter"


def gateway_need(model: ModelSizes, kv_cache_tokens: int) -> Need:
    """Memory of a gateway Pod."""
    return Need(
        {
            "process": GATEWAY_OVERHEAD_BYTES,
            "dense part": model.dense_bytes,
            f"{kv_cache_tokens} cached tokens": kv_cache_tokens * model.kv_token_bytes,
        }
    )


def router_need(model: ModelSizes) -> Need:
    """Memory of a router Pod."""
    return Need({"process": ROUTER_OVERHEAD_BYTES, "gates": model.gate_bytes})


def worker_need(host_memory_bytes: int, cpu_bytes: int = 0, replicas: int = 1) -> Need:
    """Memory of a Pod of replicas.

    Args:
        host_memory_bytes: `experts.host_memory_bytes`.
        cpu_bytes: experts of all its replicas, if they compute on the CPU; 0 for a GPU.
    """
    parts = {"Ray": RAY_OVERHEAD_BYTES, "replica": replicas * REPLICA_OVERHEAD_BYTES}
    if host_memory_bytes:
        parts["experts.host_memory_bytes"] = replicas * host_memory_bytes
    return Need(parts | ({"experts": cpu_bytes} if cpu_bytes else {"CUDA": CUDA_BYTES}))


def volume_need(model: ModelSizes) -> Need:
    """Size of a volume for the checkpoint."""
    return Need({"checkpoint": model.total_bytes})
