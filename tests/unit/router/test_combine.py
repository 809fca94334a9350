"""The combine against torch's and transformers' own sums: the same bits."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DbrxConfig, MixtralConfig
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from expertmesh.router.combine import combine

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-fp32weights"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
]
NUM_TOKENS = (1, 2, 70)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def _random(
    num_tokens: int, top_k: int, dtype: torch.dtype, weights_dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs_TKD = torch.randn(num_tokens, top_k, 100, generator=generator).to(dtype)
    weights_TK = torch.rand(num_tokens, top_k, generator=generator).to(weights_dtype)
    experts_TK = torch.rand(num_tokens, 16, generator=generator).argsort(dim=1)[:, :top_k]
    return outputs_TKD, weights_TK, experts_TK


@pytest.mark.parametrize(("dtype", "weights_dtype"), DTYPES)
@pytest.mark.parametrize("top_k", range(1, 17))
def test_slot_sum_is_torchs_sum(top_k: int, dtype: torch.dtype, weights_dtype: torch.dtype) -> None:
    for num_tokens in NUM_TOKENS:
        outputs_TKD, weights_TK, experts_TK = _random(num_tokens, top_k, dtype, weights_dtype)
        expected = (outputs_TKD * weights_TK.unsqueeze(-1)).sum(1).to(dtype)
        combined = combine(outputs_TKD, weights_TK, experts_TK, "slot_sum", dtype)
        assert combined.dtype == dtype
        assert torch.equal(combined, expected)


@pytest.mark.parametrize(("dtype", "weights_dtype"), DTYPES)
@pytest.mark.parametrize("top_k", range(1, 17))
def test_eager_is_index_add_by_ascending_expert(
    top_k: int, dtype: torch.dtype, weights_dtype: torch.dtype
) -> None:
    for num_tokens in NUM_TOKENS:
        outputs_TKD, weights_TK, experts_TK = _random(num_tokens, top_k, dtype, weights_dtype)
        expected = torch.zeros(num_tokens, 100, dtype=dtype)
        for expert in range(16):
            token, slot = torch.where(experts_TK == expert)
            rows = outputs_TKD[token, slot] * weights_TK[token, slot, None]
            expected.index_add_(0, token, rows.to(dtype))
        combined = combine(outputs_TKD, weights_TK, experts_TK, "eager", dtype)
        assert combined.dtype == dtype
        assert torch.equal(combined, expected)


def test_modes_differ_in_bf16() -> None:
    """So that the tests above can tell them apart."""
    outputs_TKD, weights_TK, experts_TK = _random(70, 8, torch.bfloat16, torch.float32)
    args = (outputs_TKD, weights_TK, experts_TK)
    slot_sum = combine(*args, "slot_sum", torch.bfloat16)
    assert not torch.equal(slot_sum, combine(*args, "eager", torch.bfloat16))


@pytest.mark.parametrize(("dtype", "weights_dtype"), DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, 5, 16])
@pytest.mark.parametrize(
    ("implementation", "mode"),
    [("grouped_mm", "slot_sum"), ("eager", "eager")],
)
def test_like_transformers_experts(
    implementation: str,
    mode: Any,
    top_k: int,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
) -> None:
    config = MixtralConfig(hidden_size=64, intermediate_size=48, num_local_experts=16)
    config._experts_implementation = implementation
    experts = MixtralExperts(config).to(dtype)
    _randomise(experts)
    for num_tokens in (1, 30):
        hidden_TD = torch.randn(num_tokens, 64).to(dtype)
        _, weights_TK, experts_TK = _random(num_tokens, top_k, dtype, weights_dtype)
        with torch.no_grad():
            expected = experts(hidden_TD, experts_TK, weights_TK)
            outputs_TKD = _by_slot(_mixtral_expert, experts, hidden_TD, experts_TK)
        combined = combine(outputs_TKD, weights_TK, experts_TK, mode, dtype)
        assert torch.equal(combined, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_like_dbrx_experts(dtype: torch.dtype) -> None:
    """dbrx has the eager loop only."""
    config = DbrxConfig(
        d_model=64, n_heads=4, ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 16}
    )
    config.ffn_config.hidden_size = 64
    experts = DbrxExperts(config.ffn_config).to(dtype)
    _randomise(experts)
    hidden_TD = torch.randn(30, 64).to(dtype)
    _, weights_TK, experts_TK = _random(30, 5, dtype, dtype)
    with torch.no_grad():
        expected = experts(hidden_TD.unsqueeze(0), experts_TK, weights_TK)[0]
        outputs_TKD = _by_slot(_dbrx_expert, experts, hidden_TD, experts_TK)
    combined = combine(outputs_TKD, weights_TK, experts_TK, "eager", dtype)
    assert torch.equal(combined, expected)


def _randomise(module: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.3)


def _by_slot(
    run: Any, experts: Any, hidden_TD: torch.Tensor, experts_TK: torch.Tensor
) -> torch.Tensor:
    """Unweighted outputs, each expert's rows in one product, scattered to their slots."""
    outputs_TKD = hidden_TD.new_empty(*experts_TK.shape, hidden_TD.shape[1])
    for expert in sorted(set(experts_TK.flatten().tolist())):
        slot, token = torch.where(expert == experts_TK.T)  # rows in the order of transformers
        outputs_TKD[token, slot] = run(experts, expert, hidden_TD[token])
    return outputs_TKD


def _mixtral_expert(experts: Any, expert: int, rows_RD: torch.Tensor) -> torch.Tensor:
    gate, up = torch.nn.functional.linear(rows_RD, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    hidden_RF = torch.nn.functional.silu(gate) * up
    return torch.nn.functional.linear(hidden_RF, experts.down_proj[expert])


def _dbrx_expert(experts: Any, expert: int, rows_RD: torch.Tensor) -> torch.Tensor:
    matrices = (getattr(experts.mlp, name).view(16, 48, 64)[expert] for name in ("w1", "v1", "w2"))
    result: torch.Tensor = experts.mlp(rows_RD, *matrices)
    return result


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, 24),
    top_k=st.integers(1, 16),
    seed=st.integers(0, 2**16),
    mode=st.sampled_from(["slot_sum", "eager"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_permuted_tokens_give_permuted_rows(
    num_tokens: int, top_k: int, seed: int, mode: Any, dtype: torch.dtype
) -> None:
    tensors = _random(num_tokens, top_k, dtype, torch.float32, seed)
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
    combined = combine(*tensors, mode, dtype)
    outputs_TKD, weights_TK, experts_TK = (tensor[order] for tensor in tensors)
    permuted = combine(outputs_TKD, weights_TK, experts_TK, mode, dtype)
    assert torch.equal(permuted, combined[order])


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, 24),
    top_k=st.integers(1, 16),
    seed=st.integers(0, 2**16),
    mode=st.sampled_from(["slot_sum", "eager"]),
)
def test_zero_weights_give_zero(num_tokens: int, top_k: int, seed: int, mode: Any) -> None:
    outputs_TKD, weights_TK, experts_TK = _random(
        num_tokens, top_k, torch.float32, torch.float32, seed
    )
    combined = combine(outputs_TKD, weights_TK * 0, experts_TK, mode, torch.float32)
    assert torch.equal(combined, torch.zeros(num_tokens, 100))


@pytest.mark.parametrize("mode", ["slot_sum", "eager"])
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_inputs_are_left_alone(mode: Any, num_tokens: int) -> None:
    tensors = _random(num_tokens, 4, torch.float32, torch.float32)
    copies = [tensor.clone() for tensor in tensors]
    combine(*tensors, mode, torch.float32)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("mode", ["slot_sum", "eager"])
def test_no_tokens(mode: Any) -> None:
    tensors = _random(0, 2, torch.bfloat16, torch.float32)
    assert combine(*tensors, mode, torch.bfloat16).shape == (0, 100)
