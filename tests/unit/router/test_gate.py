"""The gate against the routers of transformers: the same bits for every family."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.router.tiny_routers import (
    HIDDEN_SIZE,
    gate_of,
    moe_blocks,
    router_of,
    tiny_config,
    tiny_model,
)

from expertmesh.router.families import routing_spec, supported_model_types
from expertmesh.router.gate import GateWeights, Routing, route
from expertmesh.router.gate_weights import GateReader
from expertmesh.router.routing_spec import RoutingSpec
from expertmesh.runtime.checkpoint import Checkpoint

DTYPES = (torch.float32, torch.bfloat16)
# many tokens: equal bf16 logits happen; one and two: other code paths in torch and MKL
BATCHES = ((2, 150), (1, 1), (1, 2))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("model_type", supported_model_types())
def test_routes_like_transformers(model_type: str, tmp_path: Path) -> None:
    """Gate weights from disk; in fp32 and bf16, top-2 of 8."""
    config = tiny_config(model_type, 8, 2)
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    reader = GateReader(Checkpoint.open(tmp_path))
    assert reader.layers == tuple(moe_blocks(model))
    for dtype in DTYPES:
        loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
        for layer, block in moe_blocks(loaded).items():
            spec = routing_spec(config, layer)
            _check(spec, block, reader.read(layer, spec, dtype), dtype)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [(model_type, {}) for model_type in supported_model_types() if model_type != "phimoe"]
    + [
        ("cohere2_moe", {"expert_selection_fn": "softmax"}),
        ("dbrx", {"moe_normalize_expert_weights": 2.0}),
        ("dbrx", {"moe_normalize_expert_weights": None}),
        ("deepseek_v2", {"topk_method": "greedy"}),
        ("deepseek_v3", {"norm_topk_prob": False}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
        ("laguna", {"moe_router_logit_softcapping": 0.0}),
        ("lfm2_moe", {"use_expert_bias": False}),
        ("qwen3_moe", {"norm_topk_prob": True}),
    ],
    ids=str,
)
def test_routes_five_of_sixteen_like_transformers(model_type: str, changes: dict[str, Any]) -> None:
    """Gate weights from the model; in fp32 and bf16."""
    config = tiny_config(model_type, 16, 5, **changes)
    layer, block = moe_blocks(tiny_model(config)).popitem()
    spec = routing_spec(config, layer)
    for dtype in DTYPES:
        _cast(block, spec, dtype)
        _check(spec, block, gate_of(block), dtype)


def _cast(block: Any, spec: RoutingSpec, dtype: torch.dtype) -> None:
    """As from_pretrained would, which keeps some tensors in fp32 (test_gate_weights)."""
    block.to(dtype)
    if spec.gate_dtype == "fp32":
        router_of(block).float()
    for name, buffer in [*block.named_buffers(), *block.named_parameters()]:
        if name.endswith(("correction_bias", "expert_bias")) and spec.correction_dtype == "fp32":
            buffer.data = buffer.data.float()


def _check(spec: RoutingSpec, block: Any, gate: GateWeights, dtype: torch.dtype) -> None:
    for batch, length in BATCHES:
        hidden = torch.randn(batch, length, HIDDEN_SIZE, dtype=dtype)
        theirs = _transformers_routing(block, hidden, spec)
        _assert_same(route(spec, hidden.view(-1, HIDDEN_SIZE), gate), theirs)


def _assert_same(ours: Routing, theirs: Routing) -> None:
    assert torch.equal(ours.experts_TK, theirs.experts_TK)
    assert ours.experts_TK.dtype == torch.int64
    assert torch.equal(ours.weights_TK, theirs.weights_TK)
    assert ours.weights_TK.dtype == theirs.weights_TK.dtype
    assert torch.equal(ours.logits_TE.float(), theirs.logits_TE.float())


@torch.no_grad()
def _transformers_routing(block: Any, hidden: torch.Tensor, spec: RoutingSpec) -> Routing:
    """What the family's own router makes of `hidden`, and what reaches its experts."""
    to_experts: list[tuple[Any, ...]] = []
    from_router: list[Any] = []
    hooks = (
        router_of(block).register_forward_hook(
            lambda _module, _inputs, output: from_router.append(output)
        ),
        block.experts.register_forward_pre_hook(
            lambda _module, args, kwargs: to_experts.append((*args, *kwargs.values())),
            with_kwargs=True,
        ),
    )
    block(hidden)
    for hook in hooks:
        hook.remove()
    if spec.apply == "before":
        scores_TE, logits_TE = from_router[0]
        return _llama4_routing(scores_TE, logits_TE, spec)
    logits_TE = from_router[0] if torch.is_tensor(from_router[0]) else from_router[0][0]
    _, experts_TK, weights_TK = to_experts[0]
    return Routing(logits_TE, weights_TK, experts_TK)


def _llama4_routing(scores_TE: torch.Tensor, logits_TE: torch.Tensor, spec: RoutingSpec) -> Routing:
    """llama4 computes all experts, on inputs times a score that is 0 where not chosen."""
    experts_TK = logits_TE.topk(spec.top_k, dim=1).indices
    weights_TK = scores_TE.gather(1, experts_TK)
    assert torch.equal((scores_TE > 0).sum(1), torch.full((len(scores_TE),), spec.top_k))
    return Routing(logits_TE, weights_TK, experts_TK)


def test_cast_of_the_weight_is_cached() -> None:
    gate = GateWeights(torch.randn(4, 8, dtype=torch.bfloat16))
    assert gate.weight_fp32_ED.dtype == torch.float32
    assert gate.weight_fp32_ED is gate.weight_fp32_ED


def test_rows_may_lie_anywhere_in_memory() -> None:
    """Two fp32 rows whose bytes came off the wire route as rows that torch allocated."""
    spec = RoutingSpec(num_experts=64, top_k=4)
    gate = GateWeights(torch.randn(64, 256))
    hidden_TD = torch.randn(2, 256)
    expected = route(spec, hidden_TD, gate)
    for offset in range(1, 16):
        moved_TD = torch.empty(2 * 256 + 16)[offset : offset + 2 * 256].view(2, 256)
        moved_TD.copy_(hidden_TD)
        assert torch.equal(route(spec, moved_TD, gate).logits_TE, expected.logits_TE)


def test_fp32_weight_is_not_copied() -> None:
    gate = GateWeights(torch.randn(4, 8))
    assert gate.weight_fp32_ED is gate.weight_ED


def test_weights_from_choice_are_zero_outside_the_best_group() -> None:
    """deepseek_v2: in a group of one strong expert the second pick has nothing left to weigh."""
    spec = RoutingSpec(
        num_experts=4,
        top_k=2,
        logits="fp32",
        n_group=2,
        topk_group=1,
        group_score="max",
        group_fill=0.0,
        weights_from_choice=True,
    )
    gate = GateWeights(torch.tensor([[200.0], [0.0], [199.0], [199.0]]))
    routing = route(spec, torch.ones(1, 1), gate)
    best, second = routing.weights_TK[0].tolist()
    assert routing.experts_TK[0, 0] == 0
    assert best > 0.5
    assert second == 0.0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    top_k=st.integers(1, 4),
    topk_group=st.integers(1, 4),
    score=st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]),
    scale=st.floats(0.5, 3.0),
)
def test_choice_is_distinct_grouped_and_renormed(
    seed: int, top_k: int, topk_group: int, score: Any, scale: float
) -> None:
    spec = RoutingSpec(
        num_experts=16,
        top_k=top_k,
        n_group=4,
        topk_group=topk_group,
        score=score,
        correction_bias=True,
        renorm=True,
        scale=scale,
    )
    generator = torch.Generator().manual_seed(seed)
    gate = GateWeights(
        torch.randn(16, 8, generator=generator), None, torch.rand(16, generator=generator)
    )
    routing = route(spec, torch.randn(5, 8, generator=generator), gate)
    for experts in routing.experts_TK.tolist():
        assert len(set(experts)) == top_k
        assert len({expert // 4 for expert in experts}) <= topk_group
    torch.testing.assert_close(routing.weights_TK.sum(dim=1), torch.full((5,), scale))
