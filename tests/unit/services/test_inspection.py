"""`expertmesh inspect`: for people and for programs, from headers alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import tiny_checkpoint

from expertmesh.runtime.errors import ConfigError
from expertmesh.services import inspection
from expertmesh.services.cli import USER_ERROR, main
from expertmesh.services.inspection import inspect_model

EXPERT_BYTES = 3 * 64 * 48 * 2  # deepseek_v3 in bfloat16


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three layers, two of them with eight experts, in bfloat16."""
    path = tmp_path_factory.mktemp("checkpoints") / "deepseek"
    return str(tiny_checkpoint("deepseek_v3", path, dtype=torch.bfloat16))


def test_what_would_be_held_where(deepseek: str) -> None:
    found = inspect_model(deepseek, 3, "float32")
    assert found.dtype == "float32"
    assert found.held_bytes == 16 * EXPERT_BYTES * 2
    assert found.groups == {
        ids: 2 * count * EXPERT_BYTES * 2 for ids, count in {"0-1": 2, "2-4": 3, "5-7": 3}.items()
    }
    assert set(found.groups_needed) == set(inspection.DEVICES)
    assert set(found.groups_needed.values()) == {1}
    assert found.forward == "yes"


def test_auto_is_the_checkpoints_own_dtype(deepseek: str) -> None:
    found = inspect_model(deepseek, 1, "auto")
    assert (found.dtype, found.held_bytes) == ("bfloat16", 16 * EXPERT_BYTES)


def test_some_of_a_devices_memory_stays_free(
    deepseek: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_group, one_expert = 16 * EXPERT_BYTES, 2 * EXPERT_BYTES
    devices = {"just": one_group, "enough": one_group * 10 // 9 + 2, "tiny": one_expert}
    monkeypatch.setattr(inspection, "DEVICES", devices)
    needed = inspect_model(deepseek, 1, "auto").groups_needed
    assert needed == {"just": 2, "enough": 1, "tiny": None}


def test_groups_are_checked(deepseek: str) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 8"):
        inspect_model(deepseek, 9, "auto")


def test_the_report_for_people(
    deepseek: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", deepseek, "--groups", "2"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "architecture DeepseekV3ForCausalLM (deepseek_v3)",
        "layers 3, of which 2 with experts",
        "routing 8 experts, 3 per token",
        "sizes hidden 64, expert FFN 48",
        "held in bfloat16",
        "one expert 18.00 KiB on disk",
        "router Forward yes",
        "g0 │ 0-3 │ 144.00 KiB",
        "g1 │ 4-7 │ 144.00 KiB",
        "H200 (141 GB) │ 1",
    ):
        assert part in text


def test_the_report_for_programs(deepseek: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", deepseek, "--groups", "2", "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["checkpoint"]["path"] == deepseek
    assert report["checkpoint"]["num_experts"] == {"1": 8, "2": 8}
    assert report["groups"] == {"0-3": 8 * EXPERT_BYTES, "4-7": 8 * EXPERT_BYTES}
    assert report["forward"] == "yes"


def test_what_a_config_says_of_itself_is_not_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_checkpoint("mixtral", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["[/odd]", "[red]"]}))
    assert main(["inspect", str(path)]) == 0
    assert "[/odd], [red] (mixtral)" in capsys.readouterr().out


def test_wrong_flags(deepseek: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", deepseek, "--groups", "0"]) == USER_ERROR
    groups = "error: experts.groups: expected 1 to 8 (the model's experts), got 0\n"
    assert capsys.readouterr().err == groups
    with pytest.raises(SystemExit) as ending:
        main(["inspect", deepseek, "--dtype", "load"])
    assert ending.value.code == USER_ERROR
    assert "invalid choice: 'load'" in capsys.readouterr().err
