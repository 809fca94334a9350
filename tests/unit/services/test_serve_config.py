"""The Serve document of a mesh: valid for Serve, and nothing of the settings is lost on the way."""

import json
import warnings
from typing import Any

import pytest

from expertmesh.experts.assignment import parse_ids
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.runtime.config import load, validate
from expertmesh.runtime.errors import ConfigError
from expertmesh.services.gateway.deployment import GatewayArgs
from expertmesh.services.serve_config import gateway_args, group_args, serve_config
from expertmesh.services.settings import MeshSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ray.serve.schema import ServeDeploySchema

REDIS_URL = "redis://127.0.0.1:7000/0"


def settings_of(**overrides: Any) -> MeshSettings:
    """Settings of a model directory; `a__b` stands for the field a.b."""
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    return load(MeshSettings, env={}, overrides={"model": "/models/tiny"} | dotted)


def document(settings: MeshSettings, num_experts: int = 8) -> dict[str, Any]:
    """The document as a file would hold it."""
    groups = group_args(settings, "tiny", REDIS_URL, num_experts)
    config = serve_config(settings, groups, gateway_args(settings, "tiny", REDIS_URL))
    parsed: dict[str, Any] = json.loads(json.dumps(config))
    return parsed


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"experts__groups": 8, "experts__replicas": 3, "experts__num_gpus": 0.25},
        {"deterministic": True, "dtype": "bfloat16", "otlp_endpoint": "localhost:4317"},
    ],
)
def test_serve_accepts_the_document(overrides: dict[str, Any]) -> None:
    settings = settings_of(**overrides)
    parsed = ServeDeploySchema.model_validate(document(settings))
    names = [f"g{index}" for index in range(settings.experts.groups)]
    assert [app.name for app in parsed.applications] == [*names, "gateway"]
    assert [app.route_prefix for app in parsed.applications] == [None] * (len(names) + 1)
    for app, name in zip(parsed.applications, names, strict=False):
        (deployment,) = app.deployments
        assert (deployment.name, deployment.num_replicas) == (name, settings.experts.replicas)
        assert deployment.user_config == settings.experts.limits.model_dump()


def test_import_paths_lead_to_builders() -> None:
    for app in document(settings_of())["applications"]:
        module, _, name = app["import_path"].partition(":")
        assert callable(getattr(__import__(module, fromlist=[name]), name))


def test_builders_accept_their_arguments() -> None:
    *groups, gateway = document(settings_of())["applications"]
    for app in groups:
        assert validate(ExpertGroupArgs, app["args"]).group == app["name"]
    assert validate(GatewayArgs, gateway["args"]).port == 50052


def test_groups_share_the_experts_evenly() -> None:
    *groups, _ = document(settings_of(experts__groups=3))["applications"]
    ids = [parse_ids(app["args"]["experts"]) for app in groups]
    assert [len(own) for own in ids] == [2, 3, 3]
    assert [expert for own in ids for expert in own] == list(range(8))


@pytest.mark.parametrize("groups", [0, -1, 9])
def test_fewer_groups_than_one_or_more_than_experts(groups: int) -> None:
    with pytest.raises(ConfigError, match=rf"experts.groups: expected 1 to 8 .*, got {groups}$"):
        document(settings_of(experts__groups=groups))


def test_every_setting_reaches_the_groups() -> None:
    changed = {
        "mesh": "prod",
        "dtype": "float16",
        "deterministic": True,
        "max_message_bytes": 1234,
        "otlp_endpoint": "h:1",
        "log_level": "DEBUG",
    }
    of_experts = {
        "device": "cuda",
        "num_gpus": 0.5,
        "num_cpus": 2.0,
        "threads": 3,
        "host": "10.0.0.1",
        "heartbeat_s": 0.5,
        "lease_s": 5.0,
        "reject_nonfinite": True,
    }
    nested = {f"experts__{name}": value for name, value in of_experts.items()}
    settings = settings_of(**changed, **nested)
    (args, *_) = group_args(settings, "tiny", REDIS_URL, 8)
    fixed = {"group": "g0", "experts": "0-1", "model": "tiny", "redis_url": REDIS_URL, "port": 0}
    expected = changed | of_experts | fixed | {"model_dir": "/models/tiny"}
    assert args.model_dump() == expected


def test_every_setting_reaches_the_gateway() -> None:
    of_gateway: dict[str, Any] = {
        "host": "0.0.0.0",
        "port": 7,
        "engine": "exact",
        "threads": 2,
        "kv_cache_tokens": 100,
        "max_batch_tokens": 10,
        "max_running": 3,
        "max_waiting": 0,
        "num_gpus": 1.0,
        "num_cpus": 2.0,
    }
    changed = {"mesh": "prod", "dtype": "float16", "deterministic": True, "log_level": "ERROR"}
    shared = changed | {"max_message_bytes": 9, "otlp_endpoint": "h:1", "trace_sample_frac": 0.5}
    nested = {f"gateway__{name}": value for name, value in of_gateway.items()}
    args = gateway_args(settings_of(**shared, **nested), "tiny", REDIS_URL)
    own = {"model_dir": "/models/tiny", "model": "tiny", "redis_url": REDIS_URL}
    assert args.model_dump() == of_gateway | shared | own
