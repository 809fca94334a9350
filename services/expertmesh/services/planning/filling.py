"""Copies into memory that a plan leaves free. Pure.

A plan balances, and an expert whose rows are balanced by other experts' copies may have one holder;
where room is left, a second copy costs nothing and survives the loss of a GPU.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from expertmesh.experts.assignment import format_ids, parse_ids
from expertmesh.services.planning.paper import GpuPlan


def filled(gpus: Sequence[GpuPlan], expert_bytes: Mapping[int, int]) -> list[GpuPlan]:
    """The same GPUs in the same order with further experts, those with the fewest copies first.

    GPUs that hold nothing stay so. `rows_frac` stays what the plan says.

    Args:
        expert_bytes: layer -> bytes of one expert.
    """
    held = [{layer: set(parse_ids(ids)) for layer, ids in gpu.experts.items()} for gpu in gpus]
    copies = Counter(
        (layer, expert) for own in held for layer, ids in own.items() for expert in ids
    )
    room = [gpu.usable_bytes - gpu.expert_bytes for gpu in gpus]
    for place in sorted(range(len(gpus)), key=lambda place: -room[place]):
        if not held[place]:
            continue
        for layer, expert in sorted(copies, key=lambda own: (copies[own], own)):
            ids = held[place].setdefault(layer, set())
            if expert not in ids and expert_bytes[layer] <= room[place]:
                ids.add(expert)
                room[place] -= expert_bytes[layer]
                copies[layer, expert] += 1
    return _with(gpus, held, room)


def _with(
    gpus: Sequence[GpuPlan], held: Sequence[Mapping[int, set[int]]], room: Sequence[int]
) -> list[GpuPlan]:
    groups: dict[tuple[str, str], str] = {}
    found = []
    for gpu, own, free in zip(gpus, held, room, strict=True):
        experts = {layer: format_ids(ids) for layer, ids in sorted(own.items()) if ids}
        group = groups.setdefault((gpu.gpu, str(experts)), f"g{len(groups)}")
        num_bytes = gpu.usable_bytes - free
        found.append(replace(gpu, group=group, experts=experts, expert_bytes=num_bytes))
    return found
