"""ExpertFFN against transformers' own expert modules, bit for bit; the numbers are in the asserts.

Shapes: T tokens, R rows (one per token unless said otherwise), D hidden size, K experts per token.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints import FAMILIES, fp8_checkpoint, mxfp4_checkpoint, tiny_checkpoint
from tests.reference_experts import (
    assert_bit_equal,
    expert_modules,
    load_ffn,
    load_model,
    reference_dense,
    run,
)
from transformers import AutoConfig
from transformers.activations import ACT2FN

from expertmesh.experts.expert_spec import ACTIVATIONS, SUPPORTED_MODEL_TYPES, ExpertSpec
from expertmesh.experts.ffn import _ACTIVATIONS, ExpertFFN
from expertmesh.experts.reader import ExpertReader
from expertmesh.experts.stack import grouped_product, looped_product
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.errors import UnknownExpert, UnsupportedCheckpoint

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=FAMILIES)
def family_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_equal_to_transformers(family_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    if Checkpoint.open(family_path).model_type == "llama4_text":
        return  # its module is of another kind: test_llama4_is_bit_equal_with_padding
    assert_bit_equal(family_path, dtype)


def test_bit_equal_on_quantised_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(1)
    assert_bit_equal(fp8_checkpoint(tmp_path / "fp8"), torch.bfloat16)
    assert_bit_equal(mxfp4_checkpoint(tmp_path / "mxfp4"), torch.bfloat16)
    assert_bit_equal(mxfp4_checkpoint(tmp_path / "mxfp4"), torch.float32)


@pytest.mark.parametrize("padding_bytes", [0, 8, 16, 24])
def test_bit_equal_wherever_the_weights_lie_in_the_file(padding_bytes: int, tmp_path: Path) -> None:
    """transformers multiplies by fused weights where they are mapped, aligned or not."""
    torch.manual_seed(1)
    path = tiny_checkpoint("mixtral", tmp_path, fused=True)
    file = path / "model.safetensors"
    metadata = {"format": "pt", "padding": "x" * padding_bytes}
    save_file({name: tensor.clone() for name, tensor in load_file(file).items()}, file, metadata)
    assert_bit_equal(path, torch.float32)


def test_bit_equal_wherever_the_rows_lie(tmp_path: Path) -> None:
    """Rows read from a message start at any address."""
    torch.manual_seed(1)
    ffn = load_ffn(tiny_checkpoint("mixtral", tmp_path), 0, torch.float32)
    for num_rows in (1, 2, 5):
        rows_RD = torch.randn(num_rows, 64)
        expected = ffn.forward(rows_RD, [3], [num_rows])
        for skip in range(1, 16):
            elsewhere = torch.empty(rows_RD.numel() + skip)[skip:].view_as(rows_RD).copy_(rows_RD)
            assert torch.equal(ffn.forward(elsewhere, [3], [num_rows]), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 9, 16, 40])
def test_llama4_is_bit_equal_with_padding(
    num_tokens: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Llama 4 multiplies all T tokens by every expert, and float32 bits depend on the number of
    rows while it is small. An expert's rows padded with zeros to T below 4 tokens, else to 16,
    give the module's bits."""
    torch.manual_seed(1)
    path = tiny_checkpoint("llama4", tmp_path)
    module = expert_modules(load_model(path, dtype))[0]
    ffn = load_ffn(path, 0, dtype)
    hidden_TD = torch.randn(num_tokens, ffn.shape.hidden_size).to(dtype)
    with torch.inference_mode():
        expected_ETD = reference_dense(module, hidden_TD)
    for expert, chosen in enumerate(torch.rand(8, num_tokens) < torch.arange(8)[:, None] / 7):
        rows_RD = hidden_TD[chosen]
        padding = max(0, (num_tokens if num_tokens < 4 else 16) - len(rows_RD))
        padded = torch.cat([rows_RD, rows_RD.new_zeros(padding, rows_RD.shape[1])])
        got = ffn.forward(padded, [expert], [len(padded)])[: len(rows_RD)]
        assert torch.equal(got, expected_ETD[expert][chosen])
        near = ffn.forward(rows_RD, [expert], [len(rows_RD)])
        torch.testing.assert_close(near, expected_ETD[expert][chosen], rtol=1e-5, atol=1e-5)


def test_slot_sum_is_the_whole_layer(tmp_path: Path) -> None:
    """Unweighted rows, weighted and summed in slot order, are what the module returns."""
    torch.manual_seed(1)
    path = tiny_checkpoint("qwen3_moe", tmp_path)
    for dtype in DTYPES:
        module, ffn = expert_modules(load_model(path, dtype))[1], load_ffn(path, 1, dtype)
        hidden_TD, weights_TK = torch.randn(21, 64).to(dtype), torch.rand(21, 3).to(dtype)
        experts_TK = torch.rand(21, 8).argsort(1)[:, :3]
        with torch.inference_mode():
            expected = module(hidden_TD, experts_TK, weights_TK)
        rows_RD = run(ffn, hidden_TD.repeat_interleave(3, 0), experts_TK.reshape(-1))
        weighted = rows_RD.view(21, 3, 64) * weights_TK[:, :, None]
        assert torch.equal(weighted.sum(1).to(dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_and_loop_agree(family_path: Path, dtype: torch.dtype) -> None:
    """What runs on a GPU is the same function here: grouped_mm also has a CPU form."""
    layer = ExpertReader(Checkpoint.open(family_path)).layers()[-1]
    ffn = load_ffn(family_path, layer, dtype)
    rows_RD = torch.randn(9, ffn.shape.hidden_size).to(dtype)
    looped = ffn.forward(rows_RD, [1, 4, 6], [2, 6, 1])
    ffn.stack.grouped = True
    assert torch.equal(ffn.forward(rows_RD, [1, 4, 6], [2, 6, 1]), looped)


def test_products_skip_slots_without_rows() -> None:
    weights_SIO, rows_RI = torch.randn(6, 8, 16), torch.randn(5, 8)
    expected = torch.cat([rows_RI[:2] @ weights_SIO[1], rows_RI[2:] @ weights_SIO[4]])
    looped = looped_product(rows_RI, weights_SIO.unbind(), [1, 4], [2, 3])
    assert torch.equal(looped, expected)
    assert torch.equal(grouped_product(rows_RI, weights_SIO, [1, 4], [2, 3]), expected)


def test_holds_some_experts_and_only_those(tmp_path: Path) -> None:
    reader = ExpertReader(Checkpoint.open(tiny_checkpoint("gpt_oss", tmp_path)))
    some = ExpertFFN.load(reader, 0, [6, 2], reader.spec, torch.float32)
    everything = load_ffn(tmp_path, 0, torch.float32)
    rows_RD = torch.randn(4, 64)
    assert some.experts == (2, 6)
    assert some.num_bytes * 4 == everything.num_bytes
    expected = everything.forward(rows_RD, [2, 6], [3, 1])
    assert torch.equal(some.forward(rows_RD, [2, 6], [3, 1]), expected)
    with pytest.raises(UnknownExpert, match="expert 3 is not held here; held: 2, 6"):
        some.forward(rows_RD, [2, 3], [3, 1])


def test_no_rows_is_no_error(tmp_path: Path) -> None:
    tiny_checkpoint("gpt_oss", tmp_path)
    assert load_ffn(tmp_path, 0, torch.float32).forward(torch.empty(0, 64), [], []).shape == (0, 64)


def test_weights_are_copies_that_outlive_the_file(tmp_path: Path) -> None:
    ffn = load_ffn(tiny_checkpoint("mixtral", tmp_path), 0, torch.float32)
    before = ffn.forward(torch.ones(1, 64), [0], [1])
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert torch.equal(ffn.forward(torch.ones(1, 64), [0], [1]), before)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name: str) -> None:
    rows = torch.randn(50)
    assert torch.equal(_ACTIVATIONS[ACTIVATIONS[name]](rows), ACT2FN[name](rows))


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """A config.json may leave out what has its default value."""
    full = AutoConfig.for_model(model_type).to_dict() | {"model_type": model_type}
    if model_type == "dbrx":
        full["ffn_config"] = dict(full["ffn_config"])
    assert ExpertSpec.from_config({"model_type": model_type}) == ExpertSpec.from_config(full)


def test_unsupported_models_are_named() -> None:
    with pytest.raises(UnsupportedCheckpoint, match="'switch_transformers' is not supported"):
        ExpertSpec.from_config({"model_type": "switch_transformers"})
    with pytest.raises(UnsupportedCheckpoint, match="activation 'xielu' is not supported"):
        ExpertSpec.from_config({"model_type": "mixtral", "hidden_act": "xielu"})
