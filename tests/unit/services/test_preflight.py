"""What is known to be wrong before anything starts, and what is said when all is well."""

from pathlib import Path
from typing import Any

import pytest
from tests.checkpoints import tiny_checkpoint

from expertmesh.runtime.config import load
from expertmesh.runtime.device import probe_for
from expertmesh.runtime.errors import ConfigError, InsufficientMemory, NotACheckpoint
from expertmesh.services.preflight import check_before_start
from expertmesh.services.settings import MeshSettings

EXPERT_BYTES = 3 * 64 * 96 * 4  # mixtral in float32


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of eight experts."""
    return tiny_checkpoint("mixtral", tmp_path_factory.mktemp("checkpoints") / "tiny-mixtral")


def settings_of(model: Path, **overrides: Any) -> MeshSettings:
    """Settings of a model directory; `a__b` stands for the field a.b."""
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    return load(MeshSettings, env={}, overrides={"model": str(model)} | dotted)


def test_a_good_start_is_described(mixtral: Path) -> None:
    plan = check_before_start(settings_of(mixtral, experts__groups=3, experts__replicas=2))
    assert (plan.model, plan.num_experts) == ("tiny-mixtral", 8)
    assert plan.group_bytes == tuple(2 * count * EXPERT_BYTES for count in (2, 3, 3))
    assert plan.summary == (
        "tiny-mixtral: mixtral, 2 MoE layers of 8 experts, 3 groups x 2 replicas, "
        "432.00 KiB of experts per replica"
    )


def test_the_name_and_dtype_asked_for(mixtral: Path) -> None:
    plan = check_before_start(settings_of(mixtral, model_name="mine", dtype="bfloat16"))
    assert plan.model == "mine"
    assert sum(plan.group_bytes) == 16 * EXPERT_BYTES // 2


@pytest.mark.parametrize("groups", [0, -3, 9])
def test_fewer_groups_than_one_or_more_than_experts(mixtral: Path, groups: int) -> None:
    with pytest.raises(ConfigError, match=rf"experts.groups: expected 1 to 8 .*, got {groups}$"):
        check_before_start(settings_of(mixtral, experts__groups=groups))


def test_one_machine_takes_no_more_replicas_than_may_be_on_it(mixtral: Path) -> None:
    fields = {"experts__replicas": 2, "experts__max_replicas_per_node": 1}
    with pytest.raises(ConfigError, match=r"max_replicas_per_node: expected at least 2, .*, got 1"):
        check_before_start(settings_of(mixtral, **fields))


def test_experts_that_do_not_fit_are_counted(mixtral: Path) -> None:
    with pytest.raises(InsufficientMemory) as caught:
        check_before_start(settings_of(mixtral, experts__replicas=10**9))
    fields = caught.value.fields
    assert int(fields["needed_bytes"]) == 16 * EXPERT_BYTES * 10**9
    assert 0 < int(fields["free_bytes"]) < int(fields["needed_bytes"])
    assert "need 1072.88 TiB" in caught.value.message
    assert "dtype, more machines, or set" in caught.value.message


def test_a_budget_bounds_what_replicas_take(mixtral: Path) -> None:
    free_bytes = probe_for("cpu").read().free_bytes
    replicas = free_bytes // (8 * EXPERT_BYTES)  # of 16 experts each: twice what is free
    few: dict[str, Any] = {"experts__groups": 1, "experts__replicas": replicas}
    with pytest.raises(InsufficientMemory, match=r"or set `experts\.device_memory_bytes`"):
        check_before_start(settings_of(mixtral, **few))
    few["experts__device_memory_bytes"] = EXPERT_BYTES
    check_before_start(settings_of(mixtral, **few))
    with pytest.raises(InsufficientMemory):
        check_before_start(settings_of(mixtral, **few, experts__host_memory_bytes=1 << 40))


@pytest.mark.parametrize("name", ["device_memory_bytes", "host_memory_bytes"])
def test_a_budget_below_one_expert(name: str, mixtral: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_before_start(settings_of(mixtral, **{f"experts__{name}": EXPERT_BYTES - 1}))
    assert caught.value.fields == {
        "field": f"experts.{name}",
        "expected": f"at least {EXPERT_BYTES}, the bytes of the largest expert",
        "got": str(EXPERT_BYTES - 1),
    }


@pytest.mark.parametrize("elsewhere", [{"experts__num_gpus": 0.5}, {"experts__device": "cuda"}])
def test_this_machines_memory_does_not_bound_gpus(mixtral: Path, elsewhere: dict[str, Any]) -> None:
    plan = check_before_start(settings_of(mixtral, experts__replicas=10**9, **elsewhere))
    assert sum(plan.group_bytes) == 16 * EXPERT_BYTES


def test_a_directory_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match=r"config.json"):
        check_before_start(settings_of(tmp_path))
    with pytest.raises(NotACheckpoint, match="nowhere"):
        check_before_start(settings_of(tmp_path / "nowhere"))
