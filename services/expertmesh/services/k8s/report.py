"""What `expertmesh k8s render` says about what it wrote."""

from collections import Counter
from collections.abc import Iterator, Sequence

from expertmesh.experts.assignment import parse_ids
from expertmesh.experts.sizing import format_bytes
from expertmesh.services.k8s.pools import GpuPool
from expertmesh.services.k8s.render import Rendered
from expertmesh.services.planning.paper import GpuPlan


def lines_of(rendered: Rendered) -> Iterator[str]:
    """Lines for people."""
    overlay, held = rendered.overlay, _copies(rendered.gpus)
    num_experts = max(rendered.num_experts.values())
    yield (
        f"{overlay.name}: {len(rendered.num_experts)} layers of {num_experts} experts, on "
        f"{min(held.values())} to {max(held.values())} GPUs each"
    )
    for name, pool in overlay.pools.items():
        yield f"  {name}: {_pool(pool)}"
    if unused := sum(not gpu.experts for gpu in rendered.gpus):
        yield f"  {unused} of the GPUs are not used"
    for name, need in overlay.needs().items():
        yield f"  {name}: {need}"
    for note in rendered.notes:
        yield f"  {note}"
    yield f"wrote {rendered.directory}; fill the claim `weights`, then"
    yield f"  kubectl apply --server-side -k {rendered.directory}"


def _copies(gpus: Sequence[GpuPlan]) -> Counter[tuple[int, int]]:
    """(layer, expert) -> GPUs that hold it."""
    return Counter(
        (layer, expert)
        for gpu in gpus
        for layer, ids in gpu.experts.items()
        for expert in parse_ids(ids)
    )


def _pool(pool: GpuPool) -> str:
    own = pool.settings
    return (
        f"{own.groups} groups x {own.replicas} replicas, a GPU each: at most "
        f"{format_bytes(pool.expert_bytes)} of experts in {format_bytes(pool.usable_bytes)}; "
        f"{pool.rows_frac:.0%} of the rows"
    )
