"""Checkpoint directories are found complete or refused with the reason, before anything loads."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.errors import CheckpointError, DamagedShard, MissingShard, NotACheckpoint

TENSORS = {
    "a.weight": torch.arange(24, dtype=torch.float32).view(4, 6),
    "b.weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "c.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
    "c.scale": torch.ones(1, 1).to(torch.float8_e8m0fnu),
}
SHARDS = {"model-00001-of-00002.safetensors": ("a.weight",), "model-00002-of-00002.safetensors": ()}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    write_config(tmp_path)
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_config(tmp_path)
    first, second = SHARDS
    weight_map = {name: first if name == "a.weight" else second for name in TENSORS}
    for file in SHARDS:
        own = {name: tensor for name, tensor in TENSORS.items() if weight_map[name] == file}
        save_file(own, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def write_config(path: Path, **fields: object) -> None:
    (path / "config.json").write_text(json.dumps({"model_type": "mixtral"} | fields))


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_headers_and_tensors(kind: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    checkpoint = Checkpoint.open(path)
    assert set(checkpoint.names()) == set(TENSORS)
    assert "a.weight" in checkpoint
    assert "d.weight" not in checkpoint
    assert checkpoint.shape("b.weight") == (2, 3)
    names = ("a.weight", "b.weight", "c.weight", "c.scale")
    assert [checkpoint.dtype(name) for name in names] == ["F32", "BF16", "F8_E4M3", "F8_E8M0"]
    assert checkpoint.num_bytes("b.weight") == 12
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.tensor(name).float(), tensor.float())
    assert torch.equal(checkpoint.row("a.weight", 2), TENSORS["a.weight"][2])
    assert torch.equal(checkpoint.rows("a.weight", 1, 3), TENSORS["a.weight"][1:3])


def test_offset_is_where_the_bytes_are(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    start = checkpoint.offset_bytes("a.weight")
    raw = (single / "model.safetensors").read_bytes()[start : start + 96]
    assert raw == TENSORS["a.weight"].numpy().tobytes()
    assert (checkpoint.tensor("a.weight").data_ptr() - start) % 4096 == 0


def test_tensors_are_views_of_the_mapped_file(single: Path) -> None:
    row = Checkpoint.open(single).row("a.weight", 3)
    mappings = [
        line.split()
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(single / "model.safetensors"))
    ]
    ranges = [[int(end, 16) for end in fields[0].split("-")] for fields in mappings]
    assert any(start <= row.data_ptr() < stop for start, stop in ranges)


def test_config_of_the_language_model(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    assert checkpoint.model_type == "mixtral"
    assert checkpoint.text_config is checkpoint.config
    write_config(single, text_config={"model_type": "llama4_text", "hidden_size": 64})
    checkpoint = Checkpoint.open(single)
    assert checkpoint.model_type == "llama4_text"
    assert checkpoint.text_config["hidden_size"] == 64
    assert checkpoint.config["model_type"] == "mixtral"


def test_other_safetensors_beside_the_model_are_left_alone(single: Path) -> None:
    save_file({"x": torch.ones(1)}, single / "consolidated.safetensors")
    assert "x" not in Checkpoint.open(single)


def refused(path: Path, error: type[CheckpointError]) -> CheckpointError:
    with pytest.raises(error) as caught:
        Checkpoint.open(path)
    return caught.value


def test_no_directory(tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "nowhere", NotACheckpoint).message


def test_no_config(single: Path) -> None:
    (single / "config.json").unlink()
    assert "no config.json" in refused(single, NotACheckpoint).message


@pytest.mark.parametrize(("text", "reason"), [("{", "not JSON"), ("[]", "expected a JSON object")])
def test_config_that_is_no_object(single: Path, text: str, reason: str) -> None:
    (single / "config.json").write_text(text)
    assert reason in refused(single, NotACheckpoint).message


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    assert "but no weights" in refused(single, NotACheckpoint).message


def test_only_pickled_weights(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    message = refused(single, NotACheckpoint).message
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', "nonsense"])
def test_index_without_a_map(sharded: Path, index: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refused(sharded, NotACheckpoint).message


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    error = refused(sharded, MissingShard)
    assert error.fields["file"] == "model-00002-of-00002.safetensors"
    assert "model.safetensors.index.json names it" in error.message


def test_shard_without_a_tensor_of_the_index(sharded: Path) -> None:
    save_file({"other": torch.ones(1)}, sharded / "model-00001-of-00002.safetensors")
    error = refused(sharded, DamagedShard)
    assert error.fields["tensor"] == "a.weight"


@pytest.mark.parametrize("cut_bytes", [1, 100])
def test_truncated_data(single: Path, cut_bytes: int) -> None:
    file = single / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut_bytes])
    error = refused(single, DamagedShard)
    assert error.fields["expected_bytes"] == str(len(whole))
    assert error.fields["actual_bytes"] == str(len(whole) - cut_bytes)
    assert "model.safetensors" in error.message


def test_trailing_bytes(single: Path) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    refused(single, DamagedShard)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10\x00",
        struct.pack("<Q", 1000) + b"{}",
        struct.pack("<Q", 0),
        struct.pack("<Q", 4) + b"{{{{",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": {}}',
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_no_readable_header(single: Path, content: bytes) -> None:
    (single / "model.safetensors").write_bytes(content)
    error = refused(single, DamagedShard)
    assert error.fields["actual_bytes"] == str(len(content))


def test_a_file_cut_off_later_is_noticed_before_it_is_read(single: Path) -> None:
    checkpoint, file = Checkpoint.open(single), single / "model.safetensors"
    names = list(TENSORS)
    checkpoint.check_still_there(names)
    last = max(names, key=checkpoint.offset_bytes)
    os.truncate(file, checkpoint.offset_bytes(last))
    checkpoint.check_still_there(set(names) - {last})
    with pytest.raises(DamagedShard, match=r"model.safetensors: expected \d+ bytes or more"):
        checkpoint.check_still_there(names)
