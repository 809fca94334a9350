"""Which tensors of a checkpoint are routed experts, and in which of the known layouts.

Shapes: E experts, D hidden size, F FFN size.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from expertmesh.runtime.errors import UnsupportedCheckpoint

MXFP4_BLOCK = 32
"""Values that share one scale; 16 bytes of `_blocks`."""

Part = tuple[str, str]
"""(projection, kind): gate | up | down | gate_up, and weight | scale | bias | blocks | scales."""
Shapes = Mapping[str, tuple[int, ...]]


class Family(StrEnum):
    """How a layer's experts lie on disk."""

    PER_EXPERT = "one matrix per expert and projection"
    PER_EXPERT_FP8 = "one FP8 matrix per expert and projection with block scales"
    FUSED = "one [E, 2F, D] and one [E, D, F] tensor per layer"
    FUSED_TRANSPOSED = "one [E, D, 2F] and one [E, F, D] tensor per layer"
    MXFP4 = "MXFP4 blocks and scales per layer"
    STACKED = "three [E * F, D] matrices per layer"


_SUPPORTED = "; ".join(
    (
        f"{Family.PER_EXPERT} (experts.N.gate_proj|up_proj|down_proj or experts.N.w1|w3|w2)",
        f"{Family.PER_EXPERT_FP8} (weight, weight_scale_inv)",
        f"{Family.FUSED} or {Family.FUSED_TRANSPOSED} (experts.gate_up_proj and down_proj, or "
        "block_sparse_moe.input_linear and output_linear)",
        f"{Family.MXFP4} (gate_up_proj_blocks, gate_up_proj_scales)",
        f"{Family.STACKED} (experts.mlp.w1|v1|w2)",
    )
)

_PER_EXPERT = re.compile(
    r"layers\.(?P<layer>\d+)\.(?:.+\.)?experts\.(?P<expert>\d+)\.(?P<name>\w+)\.(?P<kind>\w+)$"
)
_PER_EXPERT_NAMES = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
_PER_EXPERT_KINDS = {"weight": "weight", "weight_scale_inv": "scale"}
_FUSED = re.compile(
    r"layers\.(?P<layer>\d+)\.(?:.+\.)?"
    r"(?:experts\.(?P<name>gate_up_proj|up_proj|down_proj)(?:_(?P<kind>blocks|scales|bias))?"
    r"|block_sparse_moe\.(?P<linear>input_linear|output_linear)\.weight)$"
)
_FUSED_NAMES = {
    "gate_up_proj": "gate_up",
    "up_proj": "up",
    "down_proj": "down",
    "input_linear": "gate_up",
    "output_linear": "down",
}
_STACKED = re.compile(r"blocks\.(?P<layer>\d+)\.ffn\.experts\.mlp\.(?P<name>w1|v1|w2)$")
_STACKED_NAMES = {"w1": "gate", "v1": "up", "w2": "down"}
_LAYER = re.compile(r"(?:layers|blocks)\.(\d+)\.")
_PREDICTION = re.compile(r"(?:^|\.)mtp")


@dataclass(frozen=True)
class LayerLayout:
    """The routed experts of one layer.

    Attributes:
        parts: keys by part: one mapping per expert, or a single one where a tensor holds them all.
        gated: has a gate projection.
        biased: has biases.
    """

    family: Family
    num_experts: int
    hidden_size: int
    ffn_size: int
    parts: tuple[Mapping[Part, str], ...]
    gated: bool
    biased: bool

    def keys_of(self, expert: int) -> Mapping[Part, str]:
        """The keys that hold this expert, alone or among others."""
        return self.parts[expert if len(self.parts) > 1 else 0]


@dataclass(frozen=True)
class ExpertIndex:
    """Every routed expert of a checkpoint by layer, and the keys of layers that are not served."""

    layers: Mapping[int, LayerLayout]
    ignored: frozenset[str]


def index_experts(
    shapes: Shapes, *, num_layers: int | None, num_experts: int | None
) -> ExpertIndex:
    """Finds the experts among a checkpoint's tensors by name and shape.

    Args:
        shapes: of every tensor in the checkpoint.
        num_layers: decoder layers; what lies beyond (multi-token prediction) is ignored.
        num_experts: per layer, by config.json; None when it does not say.

    Raises:
        UnsupportedCheckpoint: something that looks like an expert but is in no known layout,
            naming the key; or no experts at all.
    """
    ignored = frozenset(name for name in shapes if _is_ignored(name, num_layers))
    layers: dict[int, dict[int, dict[Part, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in shapes:
        if name in ignored:
            continue
        if (found := _recognise(name)) is None:
            if ".experts." in name:
                raise _unsupported(name, shapes, "not in a known expert layout")
            continue
        layer, expert, part = found
        if part in layers[layer][expert]:
            raise _unsupported(
                name, shapes, f"a second tensor beside {layers[layer][expert][part]}"
            )
        layers[layer][expert][part] = name
    if not layers:
        raise _no_experts(shapes, num_experts)
    return ExpertIndex(
        {layer: _layout(layers[layer], shapes, num_experts) for layer in sorted(layers)}, ignored
    )


_ALL = -1  # in place of an expert id: the tensor holds all of them


def _recognise(name: str) -> tuple[int, int, Part] | None:
    """(layer, expert or _ALL, part) of an expert tensor in a known layout, else None."""
    if found := _PER_EXPERT.search(name):
        projection = _PER_EXPERT_NAMES.get(found["name"])
        kind = _PER_EXPERT_KINDS.get(found["kind"])
        return (
            (int(found["layer"]), int(found["expert"]), (projection, kind))
            if (projection and kind)
            else None
        )
    if found := _FUSED.search(name):
        projection = _FUSED_NAMES[found["name"] or found["linear"]]
        return int(found["layer"]), _ALL, (projection, found["kind"] or "weight")
    if found := _STACKED.search(name):
        return int(found["layer"]), _ALL, (_STACKED_NAMES[found["name"]], "weight")
    return None


def _is_ignored(name: str, num_layers: int | None) -> bool:
    """Multi-token-prediction layers: after the model's own, or under an mtp module."""
    if _PREDICTION.search(name):
        return True
    found = _LAYER.search(name)
    return found is not None and num_layers is not None and int(found[1]) >= num_layers


def _layout(
    experts: Mapping[int, Mapping[Part, str]], shapes: Shapes, num_experts: int | None
) -> LayerLayout:
    shared = experts.get(_ALL)
    if shared is None:
        return _per_expert_layout(experts, shapes, num_experts)
    if len(experts) > 1:
        other = next(parts for expert, parts in experts.items() if expert != _ALL)
        raise _unsupported(next(iter(other.values())), shapes, "beside a fused tensor of its layer")
    if ("gate_up", "blocks") in shared:
        layout = _mxfp4_layout(shared, shapes)
    elif ("gate", "weight") in shared:
        layout = _stacked_layout(shared, shapes, num_experts)
    else:
        layout = _fused_layout(shared, shapes)
    return _checked(layout, shapes, num_experts)


def _per_expert_layout(
    experts: Mapping[int, Mapping[Part, str]], shapes: Shapes, num_experts: int | None
) -> LayerLayout:
    example = experts[min(experts)]
    expected = {part: shapes[key] for part, key in example.items()}
    for expert in range(num_experts or max(experts) + 1):
        got = {part: shapes[key] for part, key in experts.get(expert, {}).items()}
        if got != expected:
            there = next(iter(experts.get(expert, example).values()))
            raise _unsupported(there, shapes, f"expert {expert} of its layer differs or is missing")
    hidden_size, ffn_size = _matrix(example, ("down", "weight"), shapes)
    up_shape = _matrix(example, ("up", "weight"), shapes)
    if up_shape != (ffn_size, hidden_size):
        raise _unsupported(example["up", "weight"], shapes, f"expected {[ffn_size, hidden_size]}")
    scaled = ("down", "scale") in example
    layout = LayerLayout(
        family=Family.PER_EXPERT_FP8 if scaled else Family.PER_EXPERT,
        num_experts=len(experts),
        hidden_size=hidden_size,
        ffn_size=ffn_size,
        parts=tuple(experts[expert] for expert in sorted(experts)),
        gated=("gate", "weight") in example,
        biased=False,
    )
    return _checked(layout, shapes, num_experts)


def _matrix(parts: Mapping[Part, str], part: Part, shapes: Shapes) -> tuple[int, int]:
    rows, columns = _shape(parts, part, shapes, num_dims=2)
    return rows, columns


def _shape(
    parts: Mapping[Part, str], part: Part, shapes: Shapes, *, num_dims: int
) -> tuple[int, ...]:
    if part not in parts:
        beside = next(iter(parts.values()))
        raise _unsupported(beside, shapes, f"its expert has no {' '.join(part)}")
    shape = shapes[parts[part]]
    if len(shape) != num_dims:
        raise _unsupported(parts[part], shapes, f"expected {num_dims} dimensions")
    return shape


def _fused_layout(parts: Mapping[Part, str], shapes: Shapes) -> LayerLayout:
    """The two shapes tell [E, 2F, D] with [E, D, F] from [E, D, 2F] with [E, F, D]: no D and F
    satisfy both."""
    gated = ("up", "weight") not in parts
    first = ("gate_up" if gated else "up", "weight")
    num_experts, rows, columns = _shape(parts, first, shapes, num_dims=3)
    down = _shape(parts, ("down", "weight"), shapes, num_dims=3)
    width = 2 if gated else 1
    family = Family.FUSED
    if down != (num_experts, columns, rows // width):
        family, rows, columns = Family.FUSED_TRANSPOSED, columns, rows
        if down != (num_experts, rows // width, columns):
            raise _unsupported(parts[first], shapes, f"does not fit down's {list(down)}")
    biased = ("down", "bias") in parts
    return LayerLayout(family, num_experts, columns, rows // width, (parts,), gated, biased)


def _mxfp4_layout(parts: Mapping[Part, str], shapes: Shapes) -> LayerLayout:
    num_experts, rows, num_blocks, _ = _shape(parts, ("gate_up", "blocks"), shapes, num_dims=4)
    for part in (("gate_up", "scales"), ("down", "scales")):
        _shape(parts, part, shapes, num_dims=3)
    _shape(parts, ("down", "blocks"), shapes, num_dims=4)
    biased = ("down", "bias") in parts
    hidden_size = num_blocks * MXFP4_BLOCK
    return LayerLayout(Family.MXFP4, num_experts, hidden_size, rows // 2, (parts,), True, biased)


def _stacked_layout(
    parts: Mapping[Part, str], shapes: Shapes, num_experts: int | None
) -> LayerLayout:
    rows, hidden_size = _matrix(parts, ("down", "weight"), shapes)
    if not num_experts or rows % num_experts:
        raise _unsupported(
            parts["down", "weight"], shapes, f"config.json says {num_experts} experts"
        )
    ffn_size = rows // num_experts
    return LayerLayout(Family.STACKED, num_experts, hidden_size, ffn_size, (parts,), True, False)


def _checked(layout: LayerLayout, shapes: Shapes, num_experts: int | None) -> LayerLayout:
    if num_experts is not None and layout.num_experts != num_experts:
        key = next(iter(layout.parts[0].values()))
        why = f"its layer has {layout.num_experts} experts, config.json says {num_experts}"
        raise _unsupported(key, shapes, why)
    return layout


def _no_experts(shapes: Shapes, num_experts: int | None) -> UnsupportedCheckpoint:
    for name, shape in shapes.items():
        if len(shape) == 3 and shape[0] == num_experts and min(shape) > 1:
            return _unsupported(name, shapes, "looks like experts, in no known layout")
    return UnsupportedCheckpoint(
        f"No expert tensors: not a Mixture-of-Experts checkpoint? Layouts read: {_SUPPORTED}."
    )


def _unsupported(name: str, shapes: Shapes, why: str) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(
        f"{name} {list(shapes[name])}: {why}. Layouts read: {_SUPPORTED}.", key=name
    )
