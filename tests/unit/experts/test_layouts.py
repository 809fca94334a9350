"""Which tensor names are experts; everything else that looks like one is an error with its name."""

import pytest

from expertmesh.experts.layouts import ExpertIndex, Family, index_experts
from expertmesh.runtime.errors import UnsupportedCheckpoint

Shapes = dict[str, tuple[int, ...]]


def per_expert(block: str, gate: str, up: str, down: str, num_experts: int = 2) -> Shapes:
    """E matrices of D 4 and F 6."""
    return {
        f"{block}.experts.{expert}.{name}.weight": shape
        for expert in range(num_experts)
        for name, shape in ((gate, (6, 4)), (up, (6, 4)), (down, (4, 6)))
    }


MIXTRAL = per_expert("model.layers.0.block_sparse_moe", "w1", "w3", "w2")
QWEN = per_expert("model.layers.0.mlp", "gate_proj", "up_proj", "down_proj")


def index(shapes: Shapes, num_experts: int | None = 2, num_layers: int = 2) -> ExpertIndex:
    return index_experts(shapes, num_layers=num_layers, num_experts=num_experts)


@pytest.mark.parametrize(
    ("shapes", "family"),
    [
        (MIXTRAL, Family.PER_EXPERT),
        (QWEN, Family.PER_EXPERT),
        (
            QWEN | {f"{name}_scale_inv": (1, 1) for name in QWEN},
            Family.PER_EXPERT_FP8,
        ),
        (
            {
                "model.layers.0.mlp.experts.gate_up_proj": (2, 12, 4),
                "model.layers.0.mlp.experts.down_proj": (2, 4, 6),
            },
            Family.FUSED,
        ),
        (
            {
                "model.layers.0.block_sparse_moe.input_linear.weight": (2, 12, 4),
                "model.layers.0.block_sparse_moe.output_linear.weight": (2, 4, 6),
            },
            Family.FUSED,
        ),
        (
            {
                "language_model.model.layers.0.feed_forward.experts.gate_up_proj": (2, 4, 12),
                "language_model.model.layers.0.feed_forward.experts.down_proj": (2, 6, 4),
            },
            Family.FUSED_TRANSPOSED,
        ),
        (
            {
                f"transformer.blocks.0.ffn.experts.mlp.{name}": (12, 4)
                for name in ("w1", "v1", "w2")
            },
            Family.STACKED,
        ),
    ],
)
def test_finds_each_family(shapes: Shapes, family: Family) -> None:
    layout = index(shapes | {"model.layers.0.mlp.gate.weight": (2, 4)}).layers[0]
    assert (layout.family, layout.num_experts) == (family, 2)
    assert (layout.hidden_size, layout.ffn_size, layout.gated) == (4, 6, True)


def test_finds_mxfp4() -> None:
    block = "model.layers.0.mlp.experts"
    layout = index(
        {
            f"{block}.gate_up_proj_blocks": (2, 128, 3, 16),
            f"{block}.gate_up_proj_scales": (2, 128, 3),
            f"{block}.gate_up_proj_bias": (2, 128),
            f"{block}.down_proj_blocks": (2, 96, 2, 16),
            f"{block}.down_proj_scales": (2, 96, 2),
            f"{block}.down_proj_bias": (2, 96),
        }
    ).layers[0]
    assert (layout.family, layout.hidden_size, layout.ffn_size) == (Family.MXFP4, 96, 64)
    assert layout.biased


def test_finds_experts_without_a_gate() -> None:
    shapes = {name: shape for name, shape in QWEN.items() if "gate_proj" not in name}
    assert not index(shapes).layers[0].gated


@pytest.mark.parametrize("square", [4, 6, 12])
def test_tells_the_fused_layouts_apart_even_when_sizes_coincide(square: int) -> None:
    """With D equal to F or to 2F the pair of shapes is still unambiguous."""
    names = ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj")
    for ffn_size in (square, square // 2):
        plain = ((2, 2 * ffn_size, square), (2, square, ffn_size))
        transposed = ((2, square, 2 * ffn_size), (2, ffn_size, square))
        for pair, family in ((plain, Family.FUSED), (transposed, Family.FUSED_TRANSPOSED)):
            layout = index(dict(zip(names, pair, strict=True))).layers[0]
            assert (layout.family, layout.hidden_size) == (family, square)
            assert layout.ffn_size == ffn_size


def test_shared_experts_are_not_routed_experts() -> None:
    shared: Shapes = {
        "model.layers.0.mlp.shared_experts.gate_proj.weight": (6, 4),
        "model.layers.0.mlp.shared_expert.up_proj.weight": (6, 4),
    }
    found = index(QWEN | shared)
    assert {key for parts in found.layers[0].parts for key in parts.values()} == set(QWEN)


@pytest.mark.parametrize(
    "block", ["model.layers.2.mlp", "mtp.layers.0.mlp", "model.mtp.layers.0.mlp"]
)
def test_prediction_layers_are_ignored(block: str) -> None:
    extra = per_expert(block, "gate_proj", "up_proj", "down_proj")
    found = index(QWEN | extra)
    assert list(found.layers) == [0]
    assert found.ignored == set(extra)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.0.gate_proj.qweight",
        "model.layers.0.mlp.experts.0.linear_v.weight",
        "model.layers.0.mlp.experts.gate_up_proj_packed",
        "decoder.block.0.mlp.experts.expert_0.wi.weight",
    ],
)
def test_an_unknown_expert_key_is_named(name: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=r"known expert layout.*MXFP4") as caught:
        index(QWEN | {name: (6, 4)})
    assert caught.value.fields["key"] == name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model.layers.0.mlp.experts.1.up_proj.weight": None}, "expert 1 of its layer differs"),
        ({"model.layers.0.mlp.experts.1.up_proj.weight": (5, 4)}, "expert 1 of its layer differs"),
        ({"model.layers.0.mlp.experts.down_proj": (2, 4, 6)}, "beside a fused tensor"),
        ({"other.layers.0.mlp.experts.0.up_proj.weight": (6, 4)}, "a second tensor beside"),
    ],
)
def test_an_incomplete_layer_is_named(
    changes: dict[str, tuple[int, ...] | None], reason: str
) -> None:
    changed: dict[str, tuple[int, ...] | None] = {**QWEN, **changes}
    shapes = {name: shape for name, shape in changed.items() if shape is not None}
    with pytest.raises(UnsupportedCheckpoint, match=reason):
        index(shapes)


def test_fused_shapes_that_do_not_fit_are_named() -> None:
    block = "model.layers.0.mlp.experts"
    with pytest.raises(UnsupportedCheckpoint, match=r"gate_up_proj \[2, 12, 4\]: does not fit"):
        index({f"{block}.gate_up_proj": (2, 12, 4), f"{block}.down_proj": (2, 5, 6)})
    with pytest.raises(UnsupportedCheckpoint, match="has no down weight"):
        index({f"{block}.gate_up_proj": (2, 12, 4)})
    with pytest.raises(UnsupportedCheckpoint, match="expected 3 dimensions"):
        index({f"{block}.gate_up_proj": (12, 4), f"{block}.down_proj": (2, 5, 6)})


def test_other_number_of_experts_than_the_config_says() -> None:
    with pytest.raises(UnsupportedCheckpoint, match="expert 2 of its layer differs or is missing"):
        index(QWEN, num_experts=3)
    with pytest.raises(UnsupportedCheckpoint, match=r"has 2 experts, config\.json says 1"):
        index(QWEN, num_experts=1)
    stacked: Shapes = {f"blocks.0.ffn.experts.mlp.{name}": (13, 4) for name in ("w1", "v1", "w2")}
    with pytest.raises(UnsupportedCheckpoint, match=r"config\.json says 2 experts"):
        index(stacked)


def test_a_dense_model_and_an_unknown_layout() -> None:
    with pytest.raises(UnsupportedCheckpoint, match="not a Mixture-of-Experts checkpoint"):
        index({"model.layers.0.mlp.up_proj.weight": (6, 4)}, num_experts=None)
    with pytest.raises(UnsupportedCheckpoint, match=r"moe\.input\.weight .*no known layout"):
        index(
            {"model.layers.0.conv.weight": (2, 1, 3), "model.layers.0.moe.input.weight": (2, 6, 4)}
        )
