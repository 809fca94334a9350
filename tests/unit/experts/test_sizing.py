"""Bytes of experts and groups, and the reports made of headers alone."""

import json
from pathlib import Path

import pytest
import torch
from tests.checkpoints import fp8_checkpoint, mxfp4_checkpoint, tiny_checkpoint

from expertmesh.experts.inspection import inspect_checkpoint
from expertmesh.experts.sizing import (
    bytes_by_group,
    check_fits,
    device_budget,
    format_bytes,
    group_bytes,
    largest_group_bytes,
    min_num_groups,
)
from expertmesh.runtime.errors import ConfigError, InsufficientMemory, UnsupportedCheckpoint

GIB = 2**30


def test_bytes_of_an_assignment() -> None:
    expert_bytes = {0: 100, 3: 10}
    groups = {"a": {0: [0, 1], 3: [7]}, "b": {3: [1, 2]}, "c": {}}
    assert group_bytes(expert_bytes, groups["a"]) == 210
    assert bytes_by_group(expert_bytes, groups) == {"a": 210, "b": 20, "c": 0}


def test_even_groups() -> None:
    expert_bytes, num_experts = {0: 100, 1: 100}, {0: 8, 1: 8}
    assert largest_group_bytes(expert_bytes, num_experts, 1) == 1600
    assert largest_group_bytes(expert_bytes, num_experts, 3) == 600, "3 + 3 + 2 experts a layer"
    assert min_num_groups(expert_bytes, num_experts, 1600) == 1
    assert min_num_groups(expert_bytes, num_experts, 599) == 4
    assert min_num_groups(expert_bytes, num_experts, 200) == 8
    assert min_num_groups(expert_bytes, num_experts, 199) is None


def test_what_fits_and_what_does_not() -> None:
    check_fits("g0", 2 * GIB, 2 * GIB, "cuda:0")
    with pytest.raises(InsufficientMemory) as caught:
        check_fits("g0", 2 * GIB + GIB // 2, 512 * 2**20, "cuda:0")
    message = caught.value.message
    for part in ("group g0", "2.50 GiB", "cuda:0 has 512.00 MiB free", "more groups", "dtype"):
        assert part in message
    assert caught.value.fields["needed_bytes"] == str(2 * GIB + GIB // 2)


@pytest.mark.parametrize(
    ("asked_bytes", "free_bytes", "budget_bytes"),
    [
        (None, 800, None),
        (None, 799, 719),
        (800, 1000, None),
        (9999, 1000, None),
        (799, 1000, 799),
        (100, 100, 100),
    ],
)
def test_the_budget_is_what_was_asked_for_or_what_is_free(
    asked_bytes: int | None, free_bytes: int, budget_bytes: int | None
) -> None:
    assert device_budget("g0", asked_bytes, 800, 100, free_bytes, "cuda:0") == budget_bytes


def test_budgets_that_cannot_be() -> None:
    with pytest.raises(ConfigError) as caught:
        device_budget("g0", 99, 800, 100, 1000, "cuda:0")
    assert caught.value.fields == {
        "field": "experts.device_memory_bytes",
        "expected": "at least 100, the bytes of the largest expert",
        "got": "99",
    }
    with pytest.raises(
        InsufficientMemory, match="device_memory_bytes asks for 400 B, cuda:0 has 300 B"
    ):
        device_budget("g0", 400, 800, 100, 300, "cuda:0")
    with pytest.raises(
        InsufficientMemory, match="even its largest expert needs 100 B, cuda:0 has 99 B"
    ):
        device_budget("g0", None, 800, 100, 110, "cuda:0")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1288490189, "1.20 GiB"),
        (2**40, "1.00 TiB"),
    ],
)
def test_format(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_report(tmp_path: Path) -> None:
    report = inspect_checkpoint(tiny_checkpoint("deepseek_v3", tmp_path, dtype=torch.bfloat16))
    assert report.architecture == "DeepseekV3ForCausalLM"
    assert report.model_type == "deepseek_v3"
    assert (report.num_layers, report.top_k, report.hidden_size, report.ffn_size) == (3, 3, 64, 48)
    assert report.num_experts == {1: 8, 2: 8}
    assert report.disk_dtype == "BF16"
    assert report.expert_disk_bytes == {1: 3 * 64 * 48 * 2, 2: 3 * 64 * 48 * 2}
    assert report.expert_held_bytes(torch.float32) == {1: 3 * 64 * 48 * 4, 2: 3 * 64 * 48 * 4}
    assert report.expert_bytes == 16 * 3 * 64 * 48 * 2
    assert report.total_bytes == report.expert_bytes + report.dense_bytes
    file_bytes = (tmp_path / "model.safetensors").stat().st_size
    assert 0 < file_bytes - report.total_bytes < 20_000, "all but the header"


@pytest.mark.parametrize(("family", "top_k"), [("dbrx", 3), ("ernie4_5_moe", 3), ("llama4", 2)])
def test_report_finds_top_k_under_every_name(family: str, top_k: int, tmp_path: Path) -> None:
    assert inspect_checkpoint(tiny_checkpoint(family, tmp_path)).top_k == top_k


def test_report_counts_prediction_layers_apart(tmp_path: Path) -> None:
    path = tiny_checkpoint("deepseek_v3", tmp_path)
    config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": 2}
    (path / "config.json").write_text(json.dumps(config))
    report = inspect_checkpoint(path)
    assert report.num_experts == {1: 8}
    assert report.ignored_bytes > 8 * 3 * 64 * 48 * 4
    assert report.dense_bytes + report.expert_bytes + report.ignored_bytes == report.total_bytes


def test_report_of_quantised_checkpoints(tmp_path: Path) -> None:
    fp8 = inspect_checkpoint(fp8_checkpoint(tmp_path / "fp8"))
    assert fp8.disk_dtype == "F8_E4M3"
    assert fp8.expert_disk_bytes[1] == 3 * (256 * 256 + 4 * 4), "one factor per block of 128 x 128"
    assert fp8.expert_held_bytes(torch.bfloat16)[1] == 3 * 256 * 256 * 2
    mxfp4 = inspect_checkpoint(mxfp4_checkpoint(tmp_path / "mxfp4"))
    assert mxfp4.disk_dtype == "U8"
    assert mxfp4.spec.gate == "gpt_oss"


def test_report_of_a_config_transformers_cannot_read(tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path)
    config = json.loads((path / "config.json").read_text()) | {"hidden_size": "large"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedCheckpoint, match="transformers cannot read it"):
        inspect_checkpoint(path)
