"""The Serve document of a mesh: valid for Serve, and nothing of the settings is lost on the way."""

import json
import warnings
from typing import Any

import pytest

from expertmesh.experts.assignment import parse_ids
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.experts.live_config import GroupScaling, LiveConfig
from expertmesh.runtime.config import load, validate
from expertmesh.runtime.errors import ConfigError
from expertmesh.services.gateway.args import GatewayArgs, gateway_args
from expertmesh.services.serve_config import group_args, ray_service_config, serve_config
from expertmesh.services.settings import MeshSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ray.serve._private.deploy_utils import get_app_code_version
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

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


SCALED = {"experts__scaling__mode": "on", "experts__scaling__max_replicas": 6}


def scaled(**overrides: Any) -> tuple[ServeApplicationSchema, ...]:
    """The groups' applications, as Serve reads them."""
    parsed = ServeDeploySchema.model_validate(document(settings_of(**overrides)))
    return tuple(parsed.applications[:-1])


def test_scaled_groups_have_a_policy_of_their_own_and_a_rule_that_can_change() -> None:
    for app in scaled(**SCALED, experts__limits__max_batch_rows=9):
        (deployment,) = app.deployments
        scaling = deployment.autoscaling_config
        assert isinstance(scaling, dict)
        assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 6)
        assert (scaling["upscale_delay_s"], scaling["downscale_delay_s"]) == (0, 0)
        policy = AutoscalingConfig.model_validate(scaling).policy
        assert policy.get_policy()(**policy.policy_kwargs)
        assert policy.policy_kwargs["group"] == app.name
        live = validate(LiveConfig, deployment.user_config or {})
        assert live.limits.max_batch_rows == 9
        assert live.scaling == GroupScaling(mode="on", max_replicas=6)


def test_advice_leaves_the_number_to_the_settings() -> None:
    changes = {"experts__scaling__mode": "advisory", "experts__replicas": 3}
    for app in scaled(**changes):
        (deployment,) = app.deployments
        scaling = deployment.autoscaling_config
        assert isinstance(scaling, dict)
        assert (scaling["min_replicas"], scaling["max_replicas"]) == (3, 3)


def test_a_change_of_the_rule_restarts_nothing() -> None:
    before, after = (
        scaled(**SCALED, experts__scaling__target_busy_frac=target)[0] for target in (0.5, 0.6)
    )
    assert get_app_code_version(before) == get_app_code_version(after)
    assert before.deployments[0].user_config != after.deployments[0].user_config
    advised = scaled(**{**SCALED, "experts__scaling__mode": "advisory"})[0]
    assert get_app_code_version(before) == get_app_code_version(advised)


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


TLS = {
    "cert_file": "/tls/crt",
    "key_file": "/tls/key",
    "ca_file": "/tls/ca",
    "client_auth": "required",
}
REDIS = {
    "password_file": "/redis/password",
    "password_env": None,
    "ca_file": "/redis/ca",
    "cert_file": "/redis/crt",
    "key_file": "/redis/key",
}
SECURITY: dict[str, Any] = {
    "security__tls": TLS,
    "security__insecure": True,
    "redis": {"url": REDIS_URL} | REDIS,
}


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
        "device_memory_bytes": 1 << 30,
        "host_memory_bytes": 1 << 32,
        "guest_memory_bytes": 1 << 29,
        "prefetch": False,
        "simulated_load_bytes_per_s": 1e9,
        "host": "10.0.0.1",
        "ports": "20000-20015",
        "heartbeat_s": 0.5,
        "lease_s": 5.0,
        "reject_nonfinite": True,
        "local_socket": False,
    }
    nested = {f"experts__{name}": value for name, value in of_experts.items()}
    settings = settings_of(**changed, **nested, **SECURITY)
    (args, *_) = group_args(settings, "tiny", REDIS_URL, 8)
    fixed = {"group": "g0", "experts": "0-1", "model": "tiny", "redis_url": REDIS_URL}
    secured = {"tls": TLS, "insecure": True, "redis_secrets": REDIS, "label_selector": {}}
    expected = changed | of_experts | fixed | secured | {"model_dir": "/models/tiny"}
    assert args.model_dump() == expected


def test_every_setting_reaches_the_gateway() -> None:
    of_gateway: dict[str, Any] = {"host": "0.0.0.0", "port": 7, "drain_s": 60.0, "engine": "exact"}
    of_gateway |= {"threads": 2, "kv_cache_tokens": 100, "max_batch_tokens": 10, "max_running": 3}
    of_gateway |= {"max_waiting": 0, "max_prompt_tokens": 11, "stream_interval_s": 0.5}
    of_gateway |= {"num_gpus": 1.0, "num_cpus": 2.0}
    of_gateway |= {"max_connection_age_s": 300.0, "connection_grace_s": 600.0}
    changed = {"mesh": "prod", "dtype": "float16", "deterministic": True, "log_level": "ERROR"}
    shared = changed | {"max_message_bytes": 9, "otlp_endpoint": "h:1", "trace_sample_frac": 0.5}
    selection = {"exact_sample_frac": 0.5, "policy": "max_rank", "max_rank": 3, "cache_prior": 1.0}
    selection["layer_budgets"] = (0.5, 2.0)
    nested = {f"gateway__{name}": value for name, value in of_gateway.items()}
    nested |= {f"selection__{name}": value for name, value in selection.items()}
    failover = {"hedge_frac": 0.1, "hedge_burst": 3, "silent_s": 2.0}
    nested |= {f"failover__{name}": value for name, value in failover.items()}
    nested["missing_experts__policy"] = "renormalise"
    settings = settings_of(**shared, **nested, **SECURITY)
    args = gateway_args(settings, "tiny", REDIS_URL)
    exact = {"quality_budget": 0.0, "top_k": 0, "max_groups": 0}
    own = {"model_dir": "/models/tiny", "model": "tiny", "redis_url": REDIS_URL}
    own["missing_experts"] = "renormalise"
    sections = {"selection": selection | exact, "security": settings.security.model_dump()}
    sections |= {"redis_secrets": REDIS, "failover": failover}
    assert settings.security.tls.model_dump() == TLS
    assert args.model_dump() == of_gateway | shared | own | sections


def ray_service(settings: MeshSettings, num_experts: int = 8) -> dict[str, Any]:
    """The document of a RayService as a file would hold it."""
    groups = group_args(settings, "tiny", REDIS_URL, num_experts)
    parsed: dict[str, Any] = json.loads(json.dumps(ray_service_config(settings, groups)))
    return parsed


def test_a_ray_service_has_groups_alone_with_a_route_each() -> None:
    """Without a route no proxy gets ready, and so no worker Pod."""
    config = ray_service(settings_of(experts__groups=2))
    parsed = ServeDeploySchema.model_validate(config)
    assert [(app.name, app.route_prefix) for app in parsed.applications] == [
        ("g0", "/g0"),
        ("g1", "/g1"),
    ]
    assert parsed.proxy_location == "EveryNode"
    assert (parsed.http_options.host, parsed.http_options.port) == ("0.0.0.0", 8000)


def test_what_a_ray_service_leaves_out_is_the_default() -> None:
    settings = settings_of(experts__threads=2)
    full, short = document(settings)["applications"][0], ray_service(settings)["applications"][0]
    assert len(short["args"]) < 10
    assert validate(ExpertGroupArgs, short["args"]) == validate(ExpertGroupArgs, full["args"])


def test_pools_hold_what_they_say() -> None:
    pools = {
        "a100": {"groups": 2, "num_gpus": 1, "label_selector": {"gpu": "a100"}},
        "l4": {"groups": 2, "experts": "4-7", "replicas": 3},
    }
    config = ray_service(settings_of(experts__pools=pools, experts__num_gpus=0.5))
    groups = {app["name"]: app for app in config["applications"]}
    args = {name: validate(ExpertGroupArgs, app["args"]) for name, app in groups.items()}
    assert {name: own.experts for name, own in args.items()} == {
        "a100-0": "0-3",
        "a100-1": "4-7",
        "l4-0": "4-5",
        "l4-1": "6-7",
    }
    assert [own.num_gpus for own in args.values()] == [1, 1, 0.5, 0.5]
    assert args["a100-0"].label_selector == {"gpu": "a100"}
    assert [app["deployments"][0]["num_replicas"] for app in groups.values()] == [1, 1, 3, 3]


def test_each_group_of_a_pool_is_scaled_by_itself() -> None:
    pools = {
        "a100": {"groups": 2, "num_gpus": 1.0, "label_selector": {"gpu": "a100"}},
        "l4": {"groups": 1, "experts": "0-3", "replicas": 2, "num_gpus": 0.5},
    }
    found = {}
    for application in scaled(**SCALED, experts__pools=pools):
        [deployment] = application.deployments
        scaling = deployment.autoscaling_config
        assert isinstance(scaling, dict)
        assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 6)
        policy = scaling["policy"]["policy_kwargs"]
        found[policy["group"]] = policy["num_gpus"]
    assert found == {"a100-0": 1.0, "a100-1": 1.0, "l4-0": 0.5}


def test_advice_leaves_each_pool_its_replicas() -> None:
    pools = {"a100": {"groups": 1}, "l4": {"groups": 1, "replicas": 3}}
    advised = {**SCALED, "experts__scaling__mode": "advisory", "experts__pools": pools}
    numbers = []
    for application in scaled(**advised):
        scaling = application.deployments[0].autoscaling_config
        assert isinstance(scaling, dict)
        numbers.append((scaling["min_replicas"], scaling["max_replicas"]))
    assert numbers == [(1, 1), (3, 3)]


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        ({"a": {"groups": 9}}, r"experts.pools.a.groups: expected 1 to 8"),
        ({"a": {"groups": 1, "experts": "0-3"}}, r"experts.pools: .* got 4-7 in none"),
        ({"a": {"groups": 1, "experts": "0-8"}}, r"experts.pools.a.experts: .* 0 to 7"),
        ({"a": {"groups": 1, "experts": "x"}}, r"experts.pools.a.experts: .* got 'x'"),
    ],
)
def test_pools_that_do_not_fit_the_model(pools: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ray_service(settings_of(experts__pools=pools))


def test_the_name_of_a_pool_is_part_of_names() -> None:
    with pytest.raises(ConfigError, match=r"experts.pools.A_1"):
        settings_of(experts__pools={"A_1": {"groups": 1}})
