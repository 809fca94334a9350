"""The Serve config of a mesh: one application per expert group and one for the gateway. Pure.

The same document `serve deploy` or a RayService's serveConfigV2 takes. One application per group,
because Serve restarts all replicas of an application whose args or import path change.
"""

from typing import Any

from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.experts.live_config import GroupScaling, LiveConfig
from expertmesh.runtime.config import Settings
from expertmesh.services.gateway.args import GatewayArgs
from expertmesh.services.pools import group_replicas, planned_groups
from expertmesh.services.settings import ExpertsSettings, MeshSettings

EXPERTS_IMPORT_PATH = "expertmesh.experts.deployment:build"
GATEWAY_IMPORT_PATH = "expertmesh.services.gateway.deployment:build"
POLICY_PATH = "expertmesh.experts.scaling_policy:ScalingPolicy"
GATEWAY_APP = "gateway"
_REPORTS_KEPT = 4
SERVE_HTTP_PORT = 8000


def group_args(
    settings: MeshSettings, model: str, redis_url: str, num_experts: int
) -> list[ExpertGroupArgs]:
    """One group after the other, each with an equal share of its pool's experts."""
    experts = settings.experts
    return [
        ExpertGroupArgs(
            group=group.name,
            model_dir=settings.model,
            model=model,
            experts=group.experts,
            redis_url=redis_url,
            redis_secrets=settings.redis.secrets(),
            mesh=settings.mesh,
            dtype=settings.dtype,
            device=experts.device,
            num_gpus=group.num_gpus,
            num_cpus=experts.num_cpus,
            label_selector=group.label_selector,
            threads=experts.threads,
            device_memory_bytes=experts.device_memory_bytes,
            host_memory_bytes=experts.host_memory_bytes,
            guest_memory_bytes=experts.guest_memory_bytes,
            prefetch=experts.prefetch,
            simulated_load_bytes_per_s=experts.simulated_load_bytes_per_s,
            host=experts.host,
            ports=experts.ports,
            tls=settings.security.tls,
            insecure=settings.security.insecure,
            local_socket=experts.local_socket,
            deterministic=settings.deterministic,
            reject_nonfinite=experts.reject_nonfinite,
            max_message_bytes=settings.max_message_bytes,
            heartbeat_s=experts.heartbeat_s,
            lease_s=experts.lease_s,
            otlp_endpoint=settings.otlp_endpoint,
            log_level=settings.log_level,
        )
        for group in planned_groups(experts, num_experts)
    ]


def serve_config(
    settings: MeshSettings, groups: list[ExpertGroupArgs], gateway: GatewayArgs
) -> dict[str, Any]:
    """The document; applications not in it are deleted when it is deployed."""
    own = application(GATEWAY_APP, GATEWAY_IMPORT_PATH, gateway, [])
    applications = [*group_applications(settings, groups), own]
    return {"proxy_location": "Disabled", "applications": applications}


def ray_service_config(settings: MeshSettings, groups: list[ExpertGroupArgs]) -> dict[str, Any]:
    """The document of a RayService: the groups, and the HTTP proxies that KubeRay probes.

    A worker Pod gets ready when its proxy knows a route and has a replica to send it to. Nothing of
    ours goes that way.
    """
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": SERVE_HTTP_PORT},
        "applications": [
            app
            | {"route_prefix": f"/{args.group}"}
            | {"args": args.model_dump(mode="json", exclude_defaults=True)}
            for app, args in zip(group_applications(settings, groups), groups, strict=True)
        ],
    }


def group_applications(
    settings: MeshSettings, groups: list[ExpertGroupArgs]
) -> list[dict[str, Any]]:
    """The applications of all groups, without routes."""
    experts = settings.experts
    return [
        application(
            args.group,
            EXPERTS_IMPORT_PATH,
            args,
            [{"name": args.group, **replicas_of(experts, args, num), **spread_of(experts, num)}],
        )
        for args, num in zip(groups, group_replicas(experts), strict=True)
    ]


def replicas_of(experts: ExpertsSettings, args: ExpertGroupArgs, num: int) -> dict[str, Any]:
    """How many replicas, and what may change while they run: not in args, so that a change restarts
    nothing (but for switching scaling on or off).

    Args:
        num: replicas of the group, as configured.
    """
    rule = experts.scaling
    if rule.mode == "off":
        return {"num_replicas": num, "user_config": experts.limits.model_dump()}
    own = {name: value for name, value in rule.model_dump().items() if name != "sample_s"}
    live = LiveConfig(**experts.limits.model_dump(), scaling=GroupScaling(**own))
    advised = rule.mode == "advisory"
    return {
        "autoscaling_config": {
            # in advisory mode Serve itself sees to it that nothing changes
            "min_replicas": num if advised else rule.min_replicas,
            "max_replicas": num if advised else rule.max_replicas,
            "metrics_interval_s": rule.sample_s,
            "look_back_period_s": _REPORTS_KEPT * rule.sample_s,
            "upscale_delay_s": 0.0,  # the rule has windows of its own
            "downscale_delay_s": 0.0,
            "policy": {
                "policy_function": POLICY_PATH,
                "policy_kwargs": {
                    "group": args.group,
                    "mesh": args.mesh,
                    "redis_url": args.redis_url,
                    "redis_secrets": args.redis_secrets.model_dump(),
                    "otlp_endpoint": args.otlp_endpoint,
                    "num_gpus": args.num_gpus,
                },
            },
        },
        "user_config": live.model_dump(),
    }


def spread_of(experts: ExpertsSettings, num: int) -> dict[str, Any]:
    """How a group's replicas share nodes.

    Where they may not, a successor finds room only once an old replica has left, so one after the
    other is stopped first; a lone replica has nobody who would serve meanwhile.

    Args:
        num: replicas of the group, as configured.
    """
    most = experts.max_replicas_per_node
    if most is None:
        return {}
    fewest = experts.scaling.min_replicas if experts.scaling.mode == "on" else num
    return {"max_replicas_per_node": most} | ({"max_surge_percent": 0} if fewest > 1 else {})


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
