"""Which expert groups a mesh has, and which experts each holds. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from expertmesh.experts.assignment import format_ids, parse_ids, split_evenly
from expertmesh.runtime.errors import ConfigError
from expertmesh.services.settings import ExpertsSettings, PoolSettings

_POOLS = "experts.pools"


@dataclass(frozen=True)
class PlannedGroup:
    """One expert group of the configuration."""

    name: str
    experts: str
    """Ids held in every MoE layer, like "0-3"."""
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
            that no pool holds.
    """
    if not experts.pools:
        ranges = split_evenly(num_experts, experts.groups)
        return [
            PlannedGroup(f"g{index}", ids, experts.replicas, experts.num_gpus, {})
            for index, ids in enumerate(ranges)
        ]
    _check_complete(experts.pools, num_experts)
    return [group for name in experts.pools for group in _of_pool(name, experts, num_experts)]


def _of_pool(name: str, experts: ExpertsSettings, num_experts: int) -> Iterator[PlannedGroup]:
    pool = experts.pools[name]
    held = _held(name, pool, num_experts)
    shares = split_evenly(len(held), pool.groups, f"{_POOLS}.{name}.groups")
    num_gpus = experts.num_gpus if pool.num_gpus is None else pool.num_gpus
    for index, share in enumerate(shares):
        ids = format_ids(held[at] for at in parse_ids(share))
        yield PlannedGroup(f"{name}-{index}", ids, pool.replicas, num_gpus, pool.label_selector)


def _held(name: str, pool: PoolSettings, num_experts: int) -> Sequence[int]:
    if not pool.experts:
        return range(num_experts)
    field = f"{_POOLS}.{name}.experts"
    held = parse_ids(pool.experts, field)
    if held[-1] >= num_experts:
        raise ConfigError.of(
            field, expected=f"ids 0 to {num_experts - 1} (the model's)", got=pool.experts
        )
    return held


def _check_complete(pools: dict[str, PoolSettings], num_experts: int) -> None:
    held = {expert for name, pool in pools.items() for expert in _held(name, pool, num_experts)}
    if missing := set(range(num_experts)) - held:
        raise ConfigError.of(
            _POOLS, expected="every expert in some pool", got=f"{format_ids(missing)} in none"
        )


def group_replicas(experts: ExpertsSettings) -> list[int]:
    """Replicas of each group, in the order of `planned_groups`."""
    if not experts.pools:
        return [experts.replicas] * experts.groups
    return [pool.replicas for pool in experts.pools.values() for _ in range(pool.groups)]
