"""Which tensors of a checkpoint are the gates of its MoE layers, by name."""

import re
from collections.abc import Iterable
from typing import Literal

Role = Literal["gate weight", "gate bias", "correction bias"]
GateNames = dict[Role, list[str]]
"""Tensor names of one layer by role; normally one each."""

_BLOCK = r"(?:mlp|block_sparse_moe|feed_forward|mixer|ffn|moe)"
_GATE = r"(?:gate\.wg|router\.gate|router\.layer|gate|router)"
_PATTERNS: dict[Role, re.Pattern[str]] = {
    "gate weight": re.compile(rf"{_BLOCK}\.{_GATE}\.weight"),
    "gate bias": re.compile(rf"{_BLOCK}\.(?:gate|router)\.bias"),
    "correction bias": re.compile(
        rf"{_BLOCK}\.(?:(?:gate|router|experts|moe_statics|gate\.moe_statics)\.)?"
        r"(?:e_score_correction_bias|expert_bias)"
    ),
}
_IN_LAYER = re.compile(r"(?P<path>.*?)\b(?:layers|blocks)\.(?P<layer>\d+)\.(?P<rest>.+)")
_OTHER_MODEL = re.compile(r"\b(?:vision|visual|audio|speech|talker|mtp)")
"""Layers that are not the language model's own."""


def gate_names(tensor_names: Iterable[str]) -> dict[int, GateNames]:
    """The tensors of every layer that belong to its gate, by layer in ascending order."""
    found: dict[int, GateNames] = {}
    for name in tensor_names:
        match = _IN_LAYER.fullmatch(name)
        if match is None or _OTHER_MODEL.search(match["path"]):
            continue
        for role, pattern in _PATTERNS.items():
            if pattern.fullmatch(match["rest"]):
                layer = found.setdefault(int(match["layer"]), {})
                layer.setdefault(role, []).append(name)
    return dict(sorted(found.items()))
