"""Gates read from disk against the tensors of the model that transformers loads from there."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints import FAMILIES, tiny_checkpoint
from tests.unit.router.tiny_routers import gate_of, moe_blocks
from transformers import AutoConfig, AutoModelForCausalLM

from expertmesh.router.families import routing_spec
from expertmesh.router.gate import GateWeights
from expertmesh.router.gate_weights import GateReader
from expertmesh.router.routing_spec import RoutingSpec
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.errors import UnsupportedCheckpoint
from expertmesh.runtime.gate_names import gate_names

MIXTRAL = RoutingSpec(num_experts=8, top_k=2)
GATE = "model.layers.1.block_sparse_moe.gate.weight"


@pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_tensors_of_the_model(family: str, fused: bool, tmp_path: Path) -> None:
    """Values and dtypes, for a bf16 and an fp32 model of the same fp32 files."""
    tiny_checkpoint(family, tmp_path, fused=fused)
    config = AutoConfig.from_pretrained(tmp_path)
    reader = GateReader(Checkpoint.open(tmp_path))
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        blocks = moe_blocks(model)
        assert reader.layers == tuple(blocks)
        for layer, block in blocks.items():
            gate = reader.read(layer, routing_spec(config, layer), dtype)
            _assert_same(gate, gate_of(block))


def _assert_same(ours: GateWeights, theirs: GateWeights) -> None:
    _assert_equal(ours.weight_ED, theirs.weight_ED)
    _assert_equal(ours.bias_E, theirs.bias_E)
    _assert_equal(ours.correction_E, theirs.correction_E)


def _assert_equal(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> None:
    if ours is None or theirs is None:
        assert ours is theirs
        return
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.3.mlp.gate.weight", "gate weight"),
        ("layers.3.ffn.gate.weight", "gate weight"),
        ("backbone.layers.3.mixer.gate.weight", "gate weight"),
        ("transformer.blocks.3.ffn.router.layer.weight", "gate weight"),
        ("model.layers.3.block_sparse_moe.router.layer.weight", "gate weight"),
        ("model.language_model.layers.3.mlp.gate.weight", "gate weight"),
        ("language_model.model.layers.3.feed_forward.router.weight", "gate weight"),
        ("model.layers.3.mlp.gate.wg.weight", "gate weight"),
        ("model.layers.3.mlp.router.gate.weight", "gate weight"),
        ("model.layers.3.mlp.router.bias", "gate bias"),
        ("model.layers.3.mlp.gate.bias", "gate bias"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "correction bias"),
        ("model.layers.3.mlp.moe_statics.e_score_correction_bias", "correction bias"),
        ("model.layers.3.block_sparse_moe.e_score_correction_bias", "correction bias"),
        ("model.layers.3.moe.router.expert_bias", "correction bias"),
        ("model.layers.3.feed_forward.expert_bias", "correction bias"),
    ],
)
def test_names_of_the_hub(name: str, role: str) -> None:
    assert gate_names([name]) == {3: {role: [name]}}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.gate_proj.weight",
        "model.layers.3.mlp.linear_gate.weight",
        "model.layers.3.mlp.shared_expert_gate.weight",
        "model.layers.3.mlp.experts.0.gate.weight",
        "model.layers.3.mlp.gate.weight_scale_inv",
        "model.layers.3.self_attn.gate.weight",
        "model.vision_tower.layers.3.mlp.gate.weight",
        "mtp.layers.3.mlp.gate.weight",
        "model.norm.weight",
    ],
)
def test_other_tensors_are_not_gates(name: str) -> None:
    assert gate_names([name]) == {}


def test_layers_ascend() -> None:
    names = [f"model.layers.{layer}.mlp.gate.weight" for layer in (10, 9, 2)]
    assert list(gate_names(names)) == [2, 9, 10]


def test_right_dtype_stays_memory_mapped(mixtral: Path) -> None:
    """transformers keeps the same view, and fp32 bits of one row depend on its alignment."""
    checkpoint = Checkpoint.open(mixtral)
    gate = GateReader(checkpoint).read(1, MIXTRAL, torch.float32)
    assert gate.weight_ED.data_ptr() == checkpoint.tensor(GATE).data_ptr()


def test_missing_weight_names_layer_and_tensors(mixtral: Path) -> None:
    _edit(mixtral, drop=GATE)
    reader = GateReader(Checkpoint.open(mixtral))
    assert reader.layers == (0,)
    with pytest.raises(UnsupportedCheckpoint, match="layer 1 has no gate weight") as caught:
        reader.read(1, MIXTRAL, torch.float32)
    assert "block_sparse_moe.gate.weight" in caught.value.message
    assert caught.value.fields["layer"] == "1"
    assert reader.read(0, MIXTRAL, torch.float32).weight_ED.shape == (8, 64)


@pytest.mark.parametrize(
    ("spec", "role"),
    [
        (RoutingSpec(num_experts=8, top_k=2, correction_bias=True), "correction bias"),
        (RoutingSpec(num_experts=8, top_k=2, linear_bias=True), "gate bias"),
    ],
    ids=["correction", "linear"],
)
def test_missing_bias_names_layer_and_tensors(mixtral: Path, spec: RoutingSpec, role: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=f"layer 0 has no {role}") as caught:
        GateReader(Checkpoint.open(mixtral)).read(0, spec, torch.float32)
    assert "mlp.gate.bias" in caught.value.message


def test_correction_under_the_name_of_a_linear_bias(mixtral: Path) -> None:
    bias = torch.arange(8.0)
    _edit(mixtral, add={"model.layers.0.mlp.gate.bias": bias})
    spec = RoutingSpec(num_experts=8, top_k=2, correction_bias=True)
    gate = GateReader(Checkpoint.open(mixtral)).read(0, spec, torch.bfloat16)
    assert gate.bias_E is None
    assert gate.correction_E is not None
    assert gate.correction_E.dtype == torch.float32
    assert torch.equal(gate.correction_E, bias)


def test_two_candidates_are_refused(mixtral: Path) -> None:
    second = "model.layers.1.mlp.gate.weight"
    _edit(mixtral, add={second: torch.zeros(8, 64)})
    with pytest.raises(UnsupportedCheckpoint, match="expected one gate weight") as caught:
        GateReader(Checkpoint.open(mixtral)).read(1, MIXTRAL, torch.float32)
    assert GATE in caught.value.message
    assert second in caught.value.message


def test_quantised_gate_is_refused(mixtral: Path) -> None:
    _edit(mixtral, add={GATE: torch.zeros(8, 64).to(torch.float8_e4m3fn)})
    with pytest.raises(UnsupportedCheckpoint, match="float8_e4m3fn") as caught:
        GateReader(Checkpoint.open(mixtral)).read(1, MIXTRAL, torch.bfloat16)
    assert caught.value.fields["tensor"] == GATE


@pytest.mark.parametrize("name", [GATE, "model.layers.1.mlp.expert_bias"])
def test_wrong_number_of_experts(mixtral: Path, name: str) -> None:
    _edit(mixtral, add={name: torch.zeros(6, 64) if name == GATE else torch.zeros(6)})
    spec = RoutingSpec(num_experts=8, top_k=2, correction_bias=name != GATE)
    with pytest.raises(UnsupportedCheckpoint, match=r"layer 1: .*expected 8 experts.*\[6"):
        GateReader(Checkpoint.open(mixtral)).read(1, spec, torch.float32)


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return tiny_checkpoint("mixtral", tmp_path)


def _edit(path: Path, *, drop: str = "", add: dict[str, torch.Tensor] | None = None) -> None:
    file = path / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items() if name != drop}
    save_file(tensors | (add or {}), file, metadata={"format": "pt"})
