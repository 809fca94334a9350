"""How many bytes experts need and whether they fit a device, computed before anything is loaded."""

from collections.abc import Mapping, Sequence

from expertmesh.runtime.errors import ConfigError, InsufficientMemory

HEADROOM_FRAC = 0.1
"""Share of a device's memory left for activations, the CUDA context and other processes."""
_UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def group_bytes(
    expert_bytes: Mapping[int, int], experts_by_layer: Mapping[int, Sequence[int]]
) -> int:
    """Bytes of all experts one group holds.

    Args:
        expert_bytes: layer -> bytes of one expert (`ExpertReader.expert_bytes`).
        experts_by_layer: layer -> the experts the group holds of it.
    """
    return sum(expert_bytes[layer] * len(held) for layer, held in experts_by_layer.items())


def bytes_by_group(
    expert_bytes: Mapping[int, int], groups: Mapping[str, Mapping[int, Sequence[int]]]
) -> dict[str, int]:
    """`group_bytes` of each group of an assignment: group -> layer -> experts."""
    return {group: group_bytes(expert_bytes, held) for group, held in groups.items()}


def largest_group_bytes(
    expert_bytes: Mapping[int, int], num_experts: Mapping[int, int], num_groups: int
) -> int:
    """Bytes of the largest group when every layer's experts are spread evenly.

    Args:
        expert_bytes: layer -> bytes of one expert.
        num_experts: layer -> its experts.
        num_groups: at least 1.
    """
    return sum(expert_bytes[layer] * -(-num // num_groups) for layer, num in num_experts.items())


def min_num_groups(
    expert_bytes: Mapping[int, int], num_experts: Mapping[int, int], free_bytes: int
) -> int | None:
    """The fewest groups, spread evenly, that fit devices of `free_bytes` each; None if none do."""
    for num_groups in range(1, max(num_experts.values(), default=0) + 1):
        if largest_group_bytes(expert_bytes, num_experts, num_groups) <= free_bytes:
            return num_groups
    return None


def check_fits(
    group: str, needed_bytes: int, free_bytes: int, device: str, what: str = "its experts need"
) -> None:
    """Raises InsufficientMemory if a group's experts need more than its device has free."""
    if needed_bytes <= free_bytes:
        return
    raise InsufficientMemory(
        f"group {group}: {what} {format_bytes(needed_bytes)}, {device} has "
        f"{format_bytes(free_bytes)} free. Use more groups, a smaller dtype, or a larger device.",
        group=group,
        needed_bytes=needed_bytes,
        free_bytes=free_bytes,
        device=device,
    )


def device_budget(
    group: str,
    asked_bytes: int | None,
    needed_bytes: int,
    largest_bytes: int,
    free_bytes: int,
    device: str,
) -> int | None:
    """Bytes of device memory for a group's experts; None if all of them stay there.

    Args:
        asked_bytes: `device_memory_bytes`; None takes what is free less HEADROOM_FRAC, but only
            if that does not do for all experts.
        needed_bytes: of all experts.
        largest_bytes: of the largest expert.

    Raises:
        ConfigError: `device_memory_bytes` does not hold one expert.
        InsufficientMemory: the device has not that much free, or not enough for one expert.
    """
    if asked_bytes is None:
        if needed_bytes <= free_bytes:
            return None
        budget_bytes = int(free_bytes * (1 - HEADROOM_FRAC))
        check_fits(group, largest_bytes, budget_bytes, device, "even its largest expert needs")
        return budget_bytes
    check_holds_one("experts.device_memory_bytes", asked_bytes, largest_bytes)
    if asked_bytes >= needed_bytes:
        check_fits(group, needed_bytes, free_bytes, device)
        return None
    check_fits(group, asked_bytes, free_bytes, device, "experts.device_memory_bytes asks for")
    return asked_bytes


def check_holds_one(field: str, asked_bytes: int, largest_bytes: int) -> None:
    """Raises ConfigError if a budget is less than the largest expert."""
    if asked_bytes < largest_bytes:
        raise ConfigError.of(
            field,
            expected=f"at least {largest_bytes}, the bytes of the largest expert",
            got=asked_bytes,
            hint="Raise it or leave it out.",
        )


def format_bytes(num_bytes: int) -> str:
    """For people: 1288490188 is "1.20 GiB"."""
    for unit, size in _UNITS:
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"
