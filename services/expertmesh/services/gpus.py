"""GPUs that plans know by name: memory and published peak rates, and how a user describes others.

Sources: NVIDIA's data sheets (T4, V100, A10, L4, L40S, A100, H100, H200; DGX B200 divided by its
eight GPUs) and the Ada GPU architecture whitepaper (RTX 4090). Rates are those of dense matrices
in 16 bits; data sheets that print the double "with sparsity" are halved. Memory is in units of
10^9 bytes, a little less than a driver reports.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from expertmesh.runtime.errors import ConfigError

_GIGA, _TERA = 10**9, 10**12
_ITEM = re.compile(r"(?P<name>.+?)x(?P<count>[0-9]{1,5})")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_OWN = "describe yours with --gpu NAME=MEMORY_GB,BANDWIDTH_GB_PER_S,TFLOPS, like t9=16,320,65"


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    """Of its memory."""
    flops_per_s: float
    """Multiplications and additions of dense bfloat16 (float16 on T4 and V100) matrices."""


def _gpus(*rows: tuple[str, int, int, float]) -> dict[str, Gpu]:
    return {
        name: Gpu(name, memory * _GIGA, bandwidth * _GIGA, tera * _TERA)
        for name, memory, bandwidth, tera in rows
    }


GPUS: Mapping[str, Gpu] = _gpus(
    # name, GB, GB/s, TFLOPS
    ("t4", 16, 320, 65),  # T4 data sheet: "up to 320 GB/s", 65 TFLOPS mixed precision
    ("v100", 16, 900, 125),  # V100 data sheet: SXM2
    ("a10", 24, 600, 125),  # A10 data sheet: 125 TF bfloat16, 250 with sparsity
    ("l4", 24, 300, 121),  # L4 data sheet: 242 with sparsity
    ("rtx4090", 24, 1008, 165.2),  # Ada whitepaper: 165.2 with float32 accumulation
    ("a100", 40, 1555, 312),  # A100 data sheet: 40 GB
    ("l40s", 48, 864, 362),  # L40S data sheet: 362.05, 733 with sparsity
    ("a100-80g", 80, 2039, 312),  # A100 data sheet: 80 GB SXM
    ("h100", 80, 3350, 989),  # H100 data sheet: SXM, 1,979 with sparsity
    ("h200", 141, 4800, 989),  # H200 data sheet: SXM
    ("b200", 180, 8000, 2250),  # DGX B200 data sheet: 1,440 GB and 64 TB/s by eight; 4.5 PF sparse
)


def gpu_named(name: str, own: Mapping[str, Gpu] | None = None) -> Gpu:
    """The GPU of that name; upper and lower case are the same.

    Args:
        own: GPUs the user has described, by name; they come first.

    Raises:
        ConfigError: lists the names known, and says how to describe others.
    """
    known = {**GPUS, **(own or {})}
    found = known.get(name.lower())
    if found is None:
        raise ConfigError.of(
            "gpus", expected=f"one of {', '.join(known)}", got=repr(name), hint=f"Or {_OWN}."
        )
    return found


def parse_gpus(text: str, own: Mapping[str, Gpu] | None = None) -> list[Gpu]:
    """ "a100x2,l4" -> two A100 and one L4, in this order.

    Raises:
        ConfigError: not such a list, or as `gpu_named`.
    """
    return [gpu for item in text.split(",") for gpu in _item(item.strip(), own)]


def _item(item: str, own: Mapping[str, Gpu] | None) -> list[Gpu]:
    if item.lower() in {**GPUS, **(own or {})}:  # "rtx4090" is a name
        return [gpu_named(item, own)]
    counted = _ITEM.fullmatch(item)
    count = int(counted["count"]) if counted else 1
    if not item or not count:
        raise ConfigError.of("gpus", expected='a list like "a100x2,l4x6"', got=repr(item))
    return [gpu_named(counted["name"] if counted else item, own)] * count


def parse_own(texts: Iterable[str]) -> dict[str, Gpu]:
    """Descriptions like "t9=16,320,65" by name: GB of memory, GB/s, TFLOPS in 16 bits.

    Raises:
        ConfigError: not such a description.
    """
    return {gpu.name: gpu for gpu in map(_own, texts)}


def _own(text: str) -> Gpu:
    name, _, values = text.partition("=")
    try:
        memory, bandwidth, tera = (float(value) for value in values.split(","))
        valid = min(memory, bandwidth, tera) > 0 and max(memory, bandwidth, tera) < _GIGA
    except ValueError:
        valid = False
    if not valid or not _NAME.fullmatch(name.lower()):
        raise ConfigError.of(
            "--gpu", expected="NAME=MEMORY_GB,BANDWIDTH_GB_PER_S,TFLOPS", got=repr(text)
        )
    return Gpu(name.lower(), int(memory * _GIGA), bandwidth * _GIGA, tera * _TERA)
