"""What `expertmesh k8s render` says about what it wrote."""

from collections.abc import Iterator

from expertmesh.experts.sizing import format_bytes
from expertmesh.services.k8s.render import Rendered
from expertmesh.services.k8s.sizing import GpuPool, ModelSizes


def lines_of(rendered: Rendered) -> Iterator[str]:
    """Lines for people."""
    overlay = rendered.overlay
    total_bytes = overlay.sizes.num_experts * overlay.sizes.expert_bytes
    yield f"{overlay.name}: {overlay.sizes.num_experts} experts, {format_bytes(total_bytes)}"
    for name, pool in overlay.pools.items():
        yield f"  {name}: {_pool(pool, overlay.sizes)}"
    if rendered.unused_gpus:
        yield f"  {rendered.unused_gpus} of the GPUs are not used"
    yield f"wrote {rendered.directory}; fill the claim `weights`, then"
    yield f"  kubectl apply --server-side -k {rendered.directory}"


def _pool(pool: GpuPool, sizes: ModelSizes) -> str:
    own = pool.settings
    held = sizes.num_experts
    if own.experts:
        first, _, last = own.experts.partition("-")
        held = int(last or first) - int(first) + 1
    most = -(-held // own.groups)
    return (
        f"experts {own.experts or 'all'}, {own.groups} groups x {own.replicas} replicas, "
        f"at most {format_bytes(most * sizes.expert_bytes)} of experts each"
    )
