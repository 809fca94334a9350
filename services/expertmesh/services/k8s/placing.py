"""The planner's placement for an overlay: alike in all layers where it can be. Pure."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from expertmesh.runtime.errors import InsufficientMemory
from expertmesh.services.gpus import Gpu
from expertmesh.services.planning.filling import filled
from expertmesh.services.planning.paper import GpuPlan, Model, plan_on_paper
from expertmesh.services.planning.popularity import Popularity


def place(
    model: Model, gpus: Sequence[Gpu], popularity: Popularity | None, batch_tokens: int
) -> tuple[list[GpuPlan], Sequence[str]]:
    """(What each GPU holds, what the plan assumes); arguments as `plan_on_paper`.

    If layers do not differ, they are planned as one: a GPU then holds the same ids in all of them,
    which people can read. If experts are too large for that, or differ in popularity, each layer is
    planned.

    Raises:
        InsufficientMemory: how many bytes are missing, on what.
    """
    if popularity is None and len(set(model.num_experts.values())) == 1:
        one = _as_one(model)
        # layers apart may fit where this does not; if not, that plan says what is missing
        with suppress(InsufficientMemory):
            plan = plan_on_paper(one, gpus, None, batch_tokens=batch_tokens)
            return _in_all(model, filled(plan.gpus, one.expert_bytes)), plan.notes
    plan = plan_on_paper(model, gpus, popularity, batch_tokens=batch_tokens)
    return filled(plan.gpus, model.expert_bytes), plan.notes


def _as_one(model: Model) -> Model:
    """A layer as large as all."""
    layer, num = next(iter(model.num_experts.items()))
    expert_bytes = {layer: sum(model.expert_bytes.values())}
    return Model(
        expert_bytes, {layer: sum(model.expert_parameters.values())}, {layer: num}, model.top_k
    )


def _in_all(model: Model, gpus: Sequence[GpuPlan]) -> list[GpuPlan]:
    """What they hold of the one layer, they hold of all."""
    held = [next(iter(gpu.experts.values()), "") for gpu in gpus]
    return [
        replace(gpu, experts=dict.fromkeys(model.num_experts, ids) if ids else {})
        for gpu, ids in zip(gpus, held, strict=True)
    ]
