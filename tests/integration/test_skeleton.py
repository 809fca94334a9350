"""A model whose experts are called elsewhere answers as the complete model does, bit for bit."""

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints import FAMILIES, fp8_checkpoint, mxfp4_checkpoint, tiny_checkpoint
from tests.local_experts import LocalExperts
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from expertmesh.client.hooks import IMPLEMENTATION, attach_caller, register_caller
from expertmesh.client.remote_experts import is_experts, layer_of
from expertmesh.client.skeleton import load_skeleton, share_skeleton
from expertmesh.runtime.errors import (
    CheckpointError,
    DamagedShard,
    ExpertUnavailable,
    MissingShard,
    NotACheckpoint,
    UnsupportedCheckpoint,
)
from expertmesh.v1 import router_pb2

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def load_full(path: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": "auto"} | kwargs).eval()


def left_padded() -> dict[str, torch.Tensor]:
    ids_BS = torch.randint(3, 250, (3, 17), generator=torch.Generator().manual_seed(1))
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :5] = 0
    mask_BS[1, :2] = 0
    return {"input_ids": ids_BS, "attention_mask": mask_BS}


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**left_padded()).logits
    return logits


def greedy(model: Any) -> list[list[int]]:
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens: list[list[int]] = model.generate(**left_padded(), **options)[:, 17:].tolist()
    return tokens


def expert_parameters(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if ".experts." in name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_skeleton_equals_the_full_model(family: str, dtype: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(family, tmp_path, dtype=DTYPES[dtype])
    full = load_full(path)
    caller = LocalExperts.of(full)
    skeleton = load_skeleton(path, caller)
    assert torch.equal(logits_of(skeleton), logits_of(full))
    assert greedy(skeleton) == greedy(full)
    assert {call.layer for call in caller.calls} == caller.layers.keys()
    assert expert_parameters(full)
    assert not expert_parameters(skeleton)


@pytest.mark.parametrize("make", [fp8_checkpoint, mxfp4_checkpoint])
def test_quantised_checkpoint_is_dequantised(make: Any, tmp_path: Path) -> None:
    path = make(tmp_path)
    full = load_full(path, dtype=torch.bfloat16)
    skeleton = load_skeleton(path, LocalExperts.of(full))
    assert {tensor.dtype for tensor in skeleton.parameters()} == {torch.bfloat16}
    assert torch.equal(logits_of(skeleton), logits_of(full))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "dbrx", "llama4"])
def test_expert_tensors_are_not_needed_and_not_complained_about(
    family: str, fused: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tiny_checkpoint(family, tmp_path, fused=fused)
    caller = LocalExperts.of(load_full(path))
    capfd.readouterr()
    expected = logits_of(load_skeleton(path, caller))
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    file = path / "model.safetensors"
    dense = {name: value for name, value in load_file(file).items() if ".experts." not in name}
    save_file(dense, file, metadata={"format": "pt"})
    assert torch.equal(logits_of(load_skeleton(path, caller)), expected)


def test_dtype_and_config_overrides(tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path)
    full = load_full(path, dtype=torch.bfloat16, attn_implementation="eager")
    caller = LocalExperts.of(full)
    skeleton = load_skeleton(path, caller, dtype=torch.bfloat16, attn_implementation="eager")
    assert skeleton.config._attn_implementation == "eager"
    assert torch.equal(logits_of(skeleton), logits_of(full))


def test_eager_experts_ask_for_the_eager_order(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen2_moe", tmp_path, dtype=torch.bfloat16)
    full = load_full(path, experts_implementation="eager")
    caller = LocalExperts.of(full)
    skeleton = load_skeleton(path, caller, experts_implementation="eager")
    assert torch.equal(logits_of(skeleton), logits_of(full))
    assert {call.combine for call in caller.calls} == {router_pb2.COMBINE_EAGER}


def test_caller_errors_arrive_unchanged(tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path)
    error = ExpertUnavailable("layer 0 expert 3", layer=0, expert=3)
    caller = LocalExperts.of(load_full(path))
    skeleton = load_skeleton(path, caller)
    caller.errors[0] = error
    with pytest.raises(ExpertUnavailable) as caught:
        logits_of(skeleton)
    assert caught.value is error


def test_shared_skeleton_has_its_own_config_over_the_same_memory(tmp_path: Path) -> None:
    path = tiny_checkpoint("deepseek_v3", tmp_path)
    caller = LocalExperts.of(load_full(path))
    skeleton = load_skeleton(path, caller)
    shared = share_skeleton(skeleton)
    own, others = (dict(model.named_parameters()) for model in (skeleton, shared))
    assert {name: p.data_ptr() for name, p in own.items()} == {
        name: p.data_ptr() for name, p in others.items()
    }
    shared.set_attn_implementation("eager")
    assert skeleton.config._attn_implementation == "sdpa"
    assert all(m.caller is caller for m in shared.modules() if hasattr(m, "caller"))
    shared.set_attn_implementation("sdpa")
    assert torch.equal(logits_of(shared), logits_of(skeleton))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx", "llama4"])
def test_attach_replaces_and_frees_the_experts(family: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(family, tmp_path, dtype=torch.bfloat16)
    full, model = load_full(path), load_full(path)
    experts = [weakref.ref(p) for name, p in model.named_parameters() if ".experts." in name]
    assert attach_caller(model, LocalExperts.of(full)) is model
    gc.collect()
    assert experts
    assert not any(parameter() is not None for parameter in experts)
    assert torch.equal(logits_of(model), logits_of(full))
    assert greedy(model) == greedy(full)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_experts_implementation_calls_the_mesh(family: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(family, tmp_path, dtype=torch.bfloat16)
    full = load_full(path)
    caller = LocalExperts.of(full)
    register_caller(caller)
    model = load_full(path, experts_implementation=IMPLEMENTATION)
    assert torch.equal(logits_of(model), logits_of(full))
    assert {call.layer for call in caller.calls} == caller.layers.keys()
    assert greedy(model) == greedy(full)


def test_experts_implementation_outside_a_model_says_what_to_do(tmp_path: Path) -> None:
    full = load_full(tiny_checkpoint("mixtral", tmp_path))
    register_caller(LocalExperts.of(full))
    full.set_experts_implementation(IMPLEMENTATION)
    experts = next(module for module in full.modules() if is_experts(module))
    with pytest.raises(UnsupportedCheckpoint, match="attach"):
        experts(torch.zeros(1, 64), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2))


def test_attach_refuses_a_dense_model() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedCheckpoint, match="no experts"):
        attach_caller(model, LocalExperts({}))


def test_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match=r"config\.json"):
        load_skeleton(tmp_path, LocalExperts({}))


@pytest.mark.parametrize("model_type", ["no_such_model", "vit"])
def test_unknown_model_type(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UnsupportedCheckpoint, match=model_type):
        load_skeleton(tmp_path, LocalExperts({}))


def test_missing_shard(tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path, sharded=True)
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(MissingShard, match=shard.name):
        load_skeleton(path, LocalExperts({}))


def test_no_weights_at_all(tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path)
    (path / "model.safetensors").unlink()
    with pytest.raises(MissingShard, match=str(path)):
        load_skeleton(path, LocalExperts({}))


def test_truncated_shard(tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DamagedShard, match=str(path)):
        load_skeleton(path, LocalExperts({}))


def test_missing_dense_tensor_is_an_error_not_a_random_one(tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load_skeleton(path, LocalExperts({}))


def test_layer_of() -> None:
    assert layer_of("model.layers.12.mlp.experts") == 12
    assert layer_of("transformer.blocks.3.ffn.experts") == 3
    with pytest.raises(UnsupportedCheckpoint, match="'experts'"):
        layer_of("experts")
