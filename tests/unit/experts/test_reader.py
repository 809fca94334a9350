"""The reader gives the weights transformers holds in memory, for every family and layout."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints import FAMILIES, fp8_checkpoint, mxfp4_checkpoint, tiny_checkpoint
from tests.reference_experts import expert_modules, expert_weights, load_model, num_experts

from expertmesh.experts.reader import ExpertReader
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.errors import UnknownExpert, UnsupportedCheckpoint


def open_reader(path: Path) -> ExpertReader:
    return ExpertReader(Checkpoint.open(path))


def assert_reads_as_transformers(path: Path, dtype: torch.dtype) -> None:
    reader = open_reader(path)
    modules = expert_modules(load_model(path, dtype))
    assert reader.layers() == sorted(modules)
    for layer, module in modules.items():
        assert reader.num_experts(layer) == num_experts(module)
        for expert in range(num_experts(module)):
            got = reader.load(layer, expert, dtype).named()
            expected = expert_weights(module, expert)
            assert got.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(got[name].to(dtype), tensor), (layer, expert, name)
            assert reader.expert_bytes(layer, dtype) == sum(
                tensor.numel() * tensor.itemsize for tensor in expected.values()
            )


@pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_transformers_holds(family: str, fused: bool, tmp_path: Path) -> None:
    path = tiny_checkpoint(family, tmp_path, fused=fused)
    assert_reads_as_transformers(path, torch.float32)


def test_reads_across_shards(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path, dtype=torch.bfloat16, sharded=True)
    assert len(list(path.glob("*.safetensors"))) > 2
    assert_reads_as_transformers(path, torch.bfloat16)


def test_dequantises_fp8_as_transformers(tmp_path: Path) -> None:
    assert_reads_as_transformers(fp8_checkpoint(tmp_path), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantises_mxfp4_as_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    assert_reads_as_transformers(mxfp4_checkpoint(tmp_path), dtype)


class WatchedCheckpoint(Checkpoint):
    """Counts the elements handed out."""

    num_read = 0

    def tensor(self, name: str) -> torch.Tensor:
        return self._note(super().tensor(name))

    def row(self, name: str, index: int) -> torch.Tensor:
        return self._note(super().row(name, index))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._note(super().rows(name, start, stop))

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_read += tensor.numel()
        return tensor


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "llama4", "dbrx"])
def test_touches_only_the_expert_asked_for(family: str, tmp_path: Path) -> None:
    checkpoint = WatchedCheckpoint.open(tiny_checkpoint(family, tmp_path))
    reader = ExpertReader(checkpoint)
    assert checkpoint.num_read == 0
    reader.load(1, 3)
    assert checkpoint.num_read == reader.expert_shape(1).num_parameters


def test_views_share_the_mapped_file(tmp_path: Path) -> None:
    reader = open_reader(tiny_checkpoint("gpt_oss", tmp_path))
    tensors = reader.load(0, 2)
    assert tensors.gate is not None
    assert tensors.gate.stride() == (2, 192), "a view of [D, 2F], not a copy"
    assert tensors.up.data_ptr() - tensors.gate.data_ptr() == tensors.up.itemsize


def test_unknown_layer_and_expert(tmp_path: Path) -> None:
    reader = open_reader(tiny_checkpoint("deepseek_v3", tmp_path))
    with pytest.raises(UnknownExpert, match=r"layer 0 has no routed experts.*\[1, 2\]"):
        reader.load(0, 0)
    with pytest.raises(UnknownExpert, match="layer 1 has experts 0 to 7, not 8"):
        reader.load(1, 8)
    assert reader.load(1, 7).up.shape == (48, 64)


def edit_config(path: Path, **fields: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_rejects_a_quantisation_it_does_not_read(tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path)
    edit_config(path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedCheckpoint, match="quant_method 'gptq' is not supported"):
        open_reader(path)


def test_rejects_fp8_without_scales(tmp_path: Path) -> None:
    path = fp8_checkpoint(tmp_path)
    tensors = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale_inv")}
    save_file(kept, path / "model.safetensors")
    with pytest.raises(UnsupportedCheckpoint, match=r"experts\.0\.\w+\.weight: .* got F8_E4M3"):
        open_reader(path)


def test_ignores_prediction_layers_and_shared_experts(tmp_path: Path) -> None:
    path = tiny_checkpoint("deepseek_v3", tmp_path)
    edit_config(path, num_hidden_layers=2)
    reader = open_reader(path)
    assert reader.layers() == [1]
    assert "model.layers.2.mlp.experts.0.up_proj.weight" in reader.index.ignored
    keys = {key for parts in reader.index.layers[1].parts for key in parts.values()}
    assert not any("shared" in key for key in keys)
