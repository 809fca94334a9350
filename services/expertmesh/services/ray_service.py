"""The serveConfigV2 of a RayService, as text."""

import json

import yaml

from expertmesh.runtime.errors import ConfigError
from expertmesh.services.checkpoints import model_name
from expertmesh.services.preflight import StartPlan, plan_start
from expertmesh.services.serve_config import group_args, ray_service_config
from expertmesh.services.settings import MeshSettings


def plan_for(settings: MeshSettings, checkpoint: str) -> StartPlan:
    """What the settings make of the model, which lies elsewhere here than it will in Pods.

    Raises:
        CheckpointError, ConfigError: as `plan_start`.
    """
    return plan_start(settings.model_copy(update={"model": checkpoint}))


def serve_config_of(settings: MeshSettings, num_experts: int) -> str:
    """YAML for `serveConfigV2`.

    Args:
        num_experts: of an MoE layer of the model, the most of any layer.

    Raises:
        ConfigError: the groups do not fit them, or there is no `redis.url`.
    """
    if settings.redis.url is None:
        raise ConfigError("redis.url: replicas in a cluster need a Redis", field="redis.url")
    groups = group_args(settings, model_name(settings), settings.redis.url, num_experts)
    config = json.loads(json.dumps(ray_service_config(settings, groups)))  # no anchors
    return yaml.safe_dump(config, sort_keys=False)
