"""A plan on paper: the mesh's own placement and dispatch, GPUs as data sheets have them. Pure.

Times are at best: what the experts' weights and products take at the GPUs' published peak rates.
Messages, attention and everything else come on top.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from expertmesh.experts.assignment import format_ids
from expertmesh.experts.sizing import HEADROOM_FRAC, format_bytes
from expertmesh.router.balance import Balance, balance
from expertmesh.router.moves import Goal, Holdings
from expertmesh.router.placement import Placement, lower_bound, plan_placement
from expertmesh.router.replan import improve
from expertmesh.router.slots import share_slots
from expertmesh.runtime.errors import ConfigError, InsufficientMemory
from expertmesh.services.gpus import Gpu
from expertmesh.services.planning.popularity import Popularity

_FLOPS_PER_PARAMETER = 2
_S_PER_HOUR = 3600
_GOAL = 1.01


@dataclass(frozen=True)
class Model:
    """What a plan needs to know of a checkpoint."""

    expert_bytes: Mapping[int, int]
    """Layer -> bytes of one expert in the dtype it would be held in."""
    expert_parameters: Mapping[int, int]
    """Layer -> parameters of one expert."""
    num_experts: Mapping[int, int]
    """Layer -> its experts."""
    top_k: int
    """Experts per token."""


@dataclass(frozen=True)
class LayerPlan:
    """How one layer would be spread."""

    experts: int
    copies: int
    """Of all its experts; as many as experts if none has two."""
    most_copies: int
    """Of its most copied expert."""
    max_over_mean: float
    """Time of the GPU that takes longest over that of perfect balance."""
    bound: float
    """No placement in that many places and no dispatch has less."""

    @property
    def gap(self) -> float:
        """By how much the plan misses the bound; 0 is the best there is."""
        return self.max_over_mean / self.bound - 1


@dataclass(frozen=True)
class GpuPlan:
    """What one GPU would hold."""

    gpu: str
    group: str
    experts: Mapping[int, str]
    """Layer -> expert ids, like "0-3,7"; as `ExpertGroupArgs.experts`."""
    expert_bytes: int
    usable_bytes: int
    """Its memory less the headroom."""
    rows_frac: float
    """Its share of all rows."""


@dataclass(frozen=True)
class PaperPlan:
    """Everything `expertmesh plan` tells."""

    gpus: Sequence[GpuPlan]
    layers: Mapping[int, LayerPlan]
    batch_tokens: int
    experts_s: float
    """What the experts of all layers take for a batch, at best."""
    tokens_per_s: float
    """At most, or as the user has measured it."""
    is_measured: bool
    price_per_hour: float | None
    notes: Sequence[str]

    @property
    def cost_per_million_tokens(self) -> float | None:
        """In the currency of the prices; at least, unless tokens_per_s is measured."""
        if self.price_per_hour is None:
            return None
        return self.price_per_hour / _S_PER_HOUR / self.tokens_per_s * 1e6


def usable_bytes(gpu: Gpu) -> int:
    """Of a GPU's memory, for experts."""
    return int(gpu.memory_bytes * (1 - HEADROOM_FRAC))


def plan_on_paper(
    model: Model,
    gpus: Sequence[Gpu],
    popularity: Popularity | None,
    *,
    batch_tokens: int,
    prices: Mapping[str, float] | None = None,
    measured_tokens_per_s: float | None = None,
) -> PaperPlan:
    """Which GPU would hold which experts.

    Args:
        popularity: layer -> rows of each expert; None, and layers without rows, count as even.
        batch_tokens: tokens that go through a layer together; few are bound by memory, many by
            arithmetic.
        prices: of an hour, by name of GPU.
        measured_tokens_per_s: of the whole mesh, in place of the data sheets' best.

    Raises:
        InsufficientMemory: how many bytes are missing, on what.
        ConfigError: `prices` has none of some GPU.
    """
    price = None if prices is None else _price(gpus, prices)
    loads, notes = _loads(model, popularity)
    rooms = [usable_bytes(gpu) for gpu in gpus]
    _check_fits(model, gpus, rooms)
    slots = share_slots(rooms, model.expert_bytes, loads)
    placements: dict[int, Placement] = {}
    balances: dict[int, Balance] = {}
    layers = {}
    for layer, own in loads.items():
        rows = [load * batch_tokens * model.top_k for load in own]
        speeds = [_rows_per_s(gpu, model, layer, sum(rows)) for gpu in gpus]
        placements[layer] = _placement(rows, speeds, slots[layer])
        balances[layer] = balance(rows, speeds, placements[layer])
        layers[layer] = _layer_plan(rows, speeds, placements[layer], balances[layer])
    experts_s = sum(own.time for own in balances.values())
    return PaperPlan(
        _gpu_plans(model, gpus, placements, balances),
        layers,
        batch_tokens,
        experts_s,
        measured_tokens_per_s or batch_tokens / experts_s,
        measured_tokens_per_s is not None,
        price,
        notes,
    )


def _loads(model: Model, popularity: Popularity | None) -> tuple[Popularity, list[str]]:
    """Shares of each layer's rows."""
    if popularity is None:
        popularity, notes = {}, ["no popularity given: all experts count as equally popular"]
    else:
        unused = [str(layer) for layer in model.num_experts if not any(popularity[layer])]
        notes = [f"no rows for layers {', '.join(unused)}: planned as even"] if unused else []
    loads = {}
    for layer, count in model.num_experts.items():
        own = popularity.get(layer, [])
        total = sum(own)
        loads[layer] = [rows / total for rows in own] if total else [1 / count] * count
    return loads, notes


def _rows_per_s(gpu: Gpu, model: Model, layer: int, rows: float) -> float:
    """At best: a row's part of reading its expert's weights, or its arithmetic, whichever is
    longer."""
    rows_per_expert = max(1.0, rows / model.num_experts[layer])
    read_s = model.expert_bytes[layer] / gpu.bandwidth_bytes_per_s / rows_per_expert
    compute_s = _FLOPS_PER_PARAMETER * model.expert_parameters[layer] / gpu.flops_per_s
    return 1 / max(read_s, compute_s)


def _placement(rows: Sequence[float], speeds: Sequence[float], slots: Sequence[int]) -> Placement:
    """The mesh's, and then experts change places as long as that helps: it costs nothing yet."""
    placement = plan_placement(rows, speeds, slots)
    time = _GOAL * max(sum(rows) / sum(speeds), lower_bound(rows, speeds, sum(slots)))
    goal = Goal(rows, speeds, time, is_live=False)
    nodes = [str(place) for place in range(len(speeds))]
    holdings = Holdings({0: placement}, [0] * len(speeds), {0: 1}, nodes)
    improve(holdings, {0: goal}, inf)
    return holdings.placement[0]


def _layer_plan(
    rows: Sequence[float], speeds: Sequence[float], placement: Placement, found: Balance
) -> LayerPlan:
    copies = [len(holders) for holders in placement]
    bound = lower_bound(rows, speeds, sum(copies)) / found.mean
    return LayerPlan(len(rows), sum(copies), max(copies), found.ratio, bound)


def _gpu_plans(
    model: Model,
    gpus: Sequence[Gpu],
    placements: Mapping[int, Placement],
    balances: Mapping[int, Balance],
) -> list[GpuPlan]:
    """GPUs of one kind that hold the same are replicas of one group."""
    groups: dict[tuple[str, str], str] = {}
    plans = []
    total = sum(sum(own.levels) for own in balances.values())
    for place, gpu in enumerate(gpus):
        held = {
            layer: [expert for expert, holders in enumerate(placement) if place in holders]
            for layer, placement in placements.items()
        }
        experts = {layer: format_ids(own) for layer, own in held.items() if own}
        group = groups.setdefault((gpu.name, str(experts)), f"g{len(groups)}")
        num_bytes = sum(model.expert_bytes[layer] * len(own) for layer, own in held.items())
        rows = sum(own.levels[place] for own in balances.values())
        plans.append(GpuPlan(gpu.name, group, experts, num_bytes, usable_bytes(gpu), rows / total))
    return plans


def _check_fits(model: Model, gpus: Sequence[Gpu], rooms: Sequence[int]) -> None:
    needed = sum(model.expert_bytes[layer] * num for layer, num in model.num_experts.items())
    missing = needed - sum(rooms)
    if missing <= 0:
        return
    kinds = {gpu.name: room for gpu, room in zip(gpus, rooms, strict=True)}
    counts = {name: sum(gpu.name == name for gpu in gpus) for name in kinds}
    each = ", ".join(f"{counts[n]} x {n} with {format_bytes(room)}" for n, room in kinds.items())
    raise InsufficientMemory(
        f"gpus: the experts need {format_bytes(needed)} and there are {format_bytes(sum(rooms))} "
        f"({each}; {HEADROOM_FRAC:.0%} of memory is left free): {missing} bytes are missing. Use "
        "more GPUs, larger ones, or a smaller dtype.",
        needed_bytes=needed,
        free_bytes=sum(rooms),
        missing_bytes=missing,
    )


def _price(gpus: Sequence[Gpu], prices: Mapping[str, float]) -> float:
    missing = sorted({gpu.name for gpu in gpus} - prices.keys())
    if missing:
        raise ConfigError.of(
            "prices", expected=f"a price of {', '.join(missing)}", got=", ".join(sorted(prices))
        )
    return sum(prices[gpu.name] for gpu in gpus)
