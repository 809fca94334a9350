"""What a router says of its model, and the gates it reads one layer at a time."""

from pathlib import Path

import pytest
import torch
from tests.checkpoints import tiny_checkpoint
from transformers import AutoConfig

from expertmesh.router.served_model import ServedModel
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.errors import UnknownExpert, UnsupportedCheckpoint
from expertmesh.v1 import router_pb2, tensor_pb2


def served(path: Path, dtype: torch.dtype = torch.float32) -> ServedModel:
    """The model of a checkpoint directory."""
    config = AutoConfig.from_pretrained(path)
    return ServedModel("tiny", Checkpoint.open(path), config, dtype)


def test_the_model_as_clients_are_told(tmp_path: Path) -> None:
    model = served(tiny_checkpoint("deepseek_v3", tmp_path), torch.bfloat16)
    assert model.info() == router_pb2.ModelInfo(
        name="tiny",
        model_type="deepseek_v3",
        layers=[1, 2],
        num_experts=8,
        top_k=3,
        hidden_size=64,
        dtype=tensor_pb2.DTYPE_BFLOAT16,
    )


def test_a_gate_is_read_once(tmp_path: Path) -> None:
    model = served(tiny_checkpoint("mixtral", tmp_path))
    gate = model.gate(1)
    assert gate.spec.top_k == 2
    assert model.gate(1) is gate
    assert model.gate(0) is not gate


@pytest.mark.parametrize("layer", [0, 3])
def test_a_layer_without_experts_has_no_gate(tmp_path: Path, layer: int) -> None:
    model = served(tiny_checkpoint("deepseek_v3", tmp_path))
    with pytest.raises(UnknownExpert, match=f"layer {layer}: the model's MoE layers are 1, 2"):
        model.gate(layer)


def test_layers_that_predict_more_tokens_are_not_served(tmp_path: Path) -> None:
    path = tiny_checkpoint("deepseek_v3", tmp_path)
    config = AutoConfig.from_pretrained(path)
    config.num_hidden_layers = 2
    assert ServedModel("tiny", Checkpoint.open(path), config, torch.float32).num_experts == {1: 8}


@pytest.mark.parametrize(("family", "mode"), [("mixtral", "slot_sum"), ("dbrx", "eager")])
def test_each_family_is_summed_as_transformers_does(tmp_path: Path, family: str, mode: str) -> None:
    assert served(tiny_checkpoint(family, tmp_path)).combine_mode(0) == mode


def test_a_family_without_routing_spec_says_why_and_is_still_described(tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path)
    config = AutoConfig.from_pretrained(path)
    config.model_type = "zaya"
    model = ServedModel("tiny", Checkpoint.open(path), config, torch.float32)
    info = model.info()
    assert "carries state from layer to layer" in info.forward_unavailable
    assert (list(info.layers), info.num_experts, info.top_k) == ([0, 1], 8, 0)
    assert model.combine_mode(0) == "slot_sum"
    with pytest.raises(UnsupportedCheckpoint, match="zaya"):
        model.gate(0)
