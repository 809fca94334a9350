"""The Serve application of a group: its arguments, its options, and what importing it costs."""

import json
import subprocess
import sys

import pytest

from expertmesh.experts.deployment import ExpertGroup, ExpertGroupArgs, build
from expertmesh.experts.limits import BatchLimits
from expertmesh.runtime.config import validate
from expertmesh.runtime.errors import ConfigError

NEEDED = {
    "group": "g0",
    "model_dir": "/models/demo",
    "model": "demo",
    "experts": "0-3",
    "redis_url": "redis://127.0.0.1:6379/0",
}


def test_the_build_module_needs_no_torch() -> None:
    code = (
        "import sys, expertmesh.experts.deployment;"
        "print(*({'torch', 'transformers', 'redis'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_five_fields_make_a_group() -> None:
    args = validate(ExpertGroupArgs, NEEDED)
    assert (args.num_gpus, args.ports, args.host) == (0.0, "", "")
    for name in NEEDED:
        with pytest.raises(ConfigError, match=f"^{name}: Field required"):
            validate(ExpertGroupArgs, {key: value for key, value in NEEDED.items() if key != name})


def test_ids_by_layer_survive_json() -> None:
    args = validate(ExpertGroupArgs, NEEDED | {"experts": {0: "0-3", 12: "1"}})
    text = json.dumps(args.model_dump(mode="json"))
    assert validate(ExpertGroupArgs, json.loads(text)) == args


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicas": 2}, "replicas: no such field"),
        ({"group": ""}, "group: .* at least 1 character"),
        ({"num_replicas": 2}, "num_replicas: no such field"),
        ({"num_gpus": -0.5}, "num_gpus: .* greater than or equal to 0"),
        ({"threads": 0}, "threads: .* greater than 0"),
        ({"ports": "0"}, 'ports: .* expected ports like "20000-20015"'),
        ({"max_message_bytes": 0}, "max_message_bytes: .* greater than or equal to 1"),
        ({"heartbeat_s": 0}, "heartbeat_s: .* greater than 0"),
        ({"lease_s": 1000}, "lease_s: .* less than or equal to 600"),
        ({"heartbeat_s": 2, "lease_s": 3}, "at least 2 \\* heartbeat_s, 4 s"),
        ({"experts": 3}, "experts"),
    ],
)
def test_a_wrong_argument_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ExpertGroupArgs, NEEDED | changes)


@pytest.mark.parametrize(
    "field", [name for name in BatchLimits.model_fields if not name.endswith("_s")]
)
def test_limits_are_positive(field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: .* greater than 0, got 0"):
        validate(BatchLimits, {field: 0})


def test_limits_refuse_negative_waits_and_other_fields() -> None:
    for field in ("max_wait_s", "at_once_s"):
        with pytest.raises(ConfigError, match=f"{field}: .* greater than or equal to 0"):
            validate(BatchLimits, {field: -1})
    with pytest.raises(ConfigError, match="max_batch: no such field"):
        validate(BatchLimits, {"max_batch": 3})


def test_the_application_is_one_deployment_named_like_its_group() -> None:
    args = validate(ExpertGroupArgs, NEEDED | {"num_gpus": 0.25, "num_cpus": 2})
    deployment = build(args)._bound_deployment
    assert deployment.name == "g0"
    assert getattr(deployment.func_or_class, "__name__", "") == ExpertGroup.__name__
    assert deployment.ray_actor_options == {
        "num_gpus": 0.25,
        "num_cpus": 2.0,
        "label_selector": {},
    }
    assert deployment.user_config == BatchLimits().model_dump()
    assert deployment.init_args == (args,)
