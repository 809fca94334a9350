"""Which expert groups a mesh has, and which experts each holds. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from expertmesh.experts.assignment import experts_by_layer, format_ids, parse_ids, split_evenly
from expertmesh.runtime.errors import ConfigError
from expertmesh.services.settings import ExpertsSettings, PoolSettings

_POOLS = "experts.pools"


Share = str | dict[int, str]
"""Ids held in every MoE layer, like "0-3", or by layer."""


@dataclass(frozen=True)
class PlannedGroup:
    """One expert group of the configuration."""

    name: str
    experts: Share
    replicas: int
    num_gpus: float
    """Reserved for each replica."""
    label_selector: dict[str, str]


def planned_groups(experts: ExpertsSettings, num_experts: int) -> list[PlannedGroup]:
    """All groups: g0, g1, ... or, of pools, a100-0, a100-1, ...

    Args:
        num_experts: experts of an MoE layer, the most of any layer.

    Raises:
        ConfigError: fewer groups than 1 or more than experts; an expert the model does not have, or
            that no pool holds (`check_complete` knows more, if there are shares by layer).
    """
    if not experts.pools:
        ranges = split_evenly(num_experts, experts.groups)
        return [
            PlannedGroup(f"g{index}", ids, experts.replicas, experts.num_gpus, {})
            for index, ids in enumerate(ranges)
        ]
    groups = [group for name in experts.pools for group in _of_pool(name, experts, num_experts)]
    if all(isinstance(group.experts, str) for group in groups):
        check_complete(groups, {0: num_experts})
    return groups


def _of_pool(name: str, experts: ExpertsSettings, num_experts: int) -> Iterator[PlannedGroup]:
    pool = experts.pools[name]
    num_gpus = experts.num_gpus if pool.num_gpus is None else pool.num_gpus
    for index, share in enumerate(_shares(name, pool, num_experts)):
        yield PlannedGroup(f"{name}-{index}", share, pool.replicas, num_gpus, pool.label_selector)


def _shares(name: str, pool: PoolSettings, num_experts: int) -> Sequence[Share]:
    field = f"{_POOLS}.{name}"
    if not pool.shares:
        held = _held(f"{field}.experts", pool.experts, num_experts)
        parts = split_evenly(len(held), pool.groups, f"{field}.groups")
        return [format_ids(held[at] for at in parse_ids(part)) for part in parts]
    if pool.experts:
        raise ConfigError.of(f"{field}.experts", expected="none beside shares", got=pool.experts)
    if len(pool.shares) != pool.groups:
        expected = f"one for each of the {pool.groups} groups"
        raise ConfigError.of(f"{field}.shares", expected=expected, got=len(pool.shares))
    for share in pool.shares:
        for ids in [share] if isinstance(share, str) else share.values():
            _held(f"{field}.shares", ids, num_experts)
    return pool.shares


def _held(field: str, text: str, num_experts: int) -> Sequence[int]:
    if not text:
        return range(num_experts)
    held = parse_ids(text, field)
    if held[-1] >= num_experts:
        raise ConfigError.of(field, expected=f"ids 0 to {num_experts - 1} (the model's)", got=text)
    return held


def check_complete(groups: Sequence[PlannedGroup], layers: Mapping[int, int]) -> None:
    """That some group holds each expert.

    Args:
        layers: experts of each MoE layer.

    Raises:
        ConfigError: names the experts, and the layer if they are by layer.
    """
    held: dict[int, set[int]] = {layer: set() for layer in layers}
    for group in groups:
        for layer, ids in experts_by_layer(group.experts, layers).items():
            held[layer].update(ids)
    for layer, num in layers.items():
        if missing := set(range(num)) - held[layer]:
            where = f" of layer {layer}" if len(layers) > 1 else ""
            raise ConfigError.of(
                _POOLS,
                expected="every expert in some pool",
                got=f"{format_ids(missing)}{where} in none",
            )


def group_replicas(experts: ExpertsSettings) -> list[int]:
    """Replicas of each group, in the order of `planned_groups`."""
    if not experts.pools:
        return [experts.replicas] * experts.groups
    return [pool.replicas for pool in experts.pools.values() for _ in range(pool.groups)]
