"""The Serve config of a mesh: one application per expert group and one for the gateway. Pure.

The same document `serve deploy` or a RayService's serveConfigV2 takes. One application per group,
because Serve restarts all replicas of an application whose args or import path change.
"""

from typing import Any

from expertmesh.experts.assignment import split_evenly
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.runtime.config import Settings
from expertmesh.services.gateway.deployment import GatewayArgs
from expertmesh.services.settings import MeshSettings

EXPERTS_IMPORT_PATH = "expertmesh.experts.deployment:build"
GATEWAY_IMPORT_PATH = "expertmesh.services.gateway.deployment:build"
GATEWAY_APP = "gateway"


def group_names(num_groups: int) -> list[str]:
    """g0, g1, ..."""
    return [f"g{index}" for index in range(num_groups)]


def group_args(
    settings: MeshSettings, model: str, redis_url: str, num_experts: int
) -> list[ExpertGroupArgs]:
    """One group after the other, each with an equal share of every layer's experts."""
    experts = settings.experts
    ranges = split_evenly(num_experts, experts.groups)
    return [
        ExpertGroupArgs(
            group=group,
            model_dir=settings.model,
            model=model,
            experts=ids,
            redis_url=redis_url,
            mesh=settings.mesh,
            dtype=settings.dtype,
            device=experts.device,
            num_gpus=experts.num_gpus,
            num_cpus=experts.num_cpus,
            threads=experts.threads,
            host=experts.host,
            deterministic=settings.deterministic,
            reject_nonfinite=experts.reject_nonfinite,
            max_message_bytes=settings.max_message_bytes,
            heartbeat_s=experts.heartbeat_s,
            lease_s=experts.lease_s,
            otlp_endpoint=settings.otlp_endpoint,
            log_level=settings.log_level,
        )
        for group, ids in zip(group_names(experts.groups), ranges, strict=True)
    ]


def gateway_args(settings: MeshSettings, model: str, redis_url: str) -> GatewayArgs:
    """The gateway of the same mesh."""
    return GatewayArgs(
        model_dir=settings.model,
        model=model,
        redis_url=redis_url,
        mesh=settings.mesh,
        dtype=settings.dtype,
        deterministic=settings.deterministic,
        max_message_bytes=settings.max_message_bytes,
        otlp_endpoint=settings.otlp_endpoint,
        trace_sample_frac=settings.trace_sample_frac,
        log_level=settings.log_level,
        **settings.gateway.model_dump(),
    )


def serve_config(
    settings: MeshSettings, groups: list[ExpertGroupArgs], gateway: GatewayArgs
) -> dict[str, Any]:
    """The document; applications not in it are deleted when it is deployed."""
    # not in args: a change of these restarts nothing
    scaled = {
        "num_replicas": settings.experts.replicas,
        "user_config": settings.experts.limits.model_dump(),
    }
    applications = [
        application(
            args.group,
            EXPERTS_IMPORT_PATH,
            args,
            [{"name": args.group, **scaled}],
        )
        for args in groups
    ]
    own = application(GATEWAY_APP, GATEWAY_IMPORT_PATH, gateway, [])
    return {"proxy_location": "Disabled", "applications": [*applications, own]}


def application(
    name: str, import_path: str, args: Settings, deployments: list[dict[str, Any]]
) -> dict[str, Any]:
    """One entry of a Serve config's `applications`."""
    return {
        "name": name,
        "route_prefix": None,
        "import_path": import_path,
        "args": args.model_dump(mode="json"),
        "deployments": deployments,
    }
