"""Reads the gates of a checkpoint, and nothing else of it, in the dtypes transformers keeps.

Shapes: E experts, D hidden size.
"""

import torch

from expertmesh.router.gate import GateWeights
from expertmesh.router.routing_spec import RoutingSpec
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.errors import UnsupportedCheckpoint
from expertmesh.runtime.gate_names import GateNames, Role, gate_names
from expertmesh.runtime.tensors import dtype_name

_TRIED: dict[Role, tuple[str, ...]] = {
    "gate weight": (
        "mlp.gate.weight",
        "block_sparse_moe.gate.weight",
        "mlp.router.weight",
        "feed_forward.router.weight",
        "feed_forward.gate.weight",
        "mixer.gate.weight",
        "mlp.gate.wg.weight",
        "mlp.router.gate.weight",
        "block_sparse_moe.router.layer.weight",
        "ffn.router.layer.weight",
    ),
    "gate bias": ("mlp.router.bias", "mlp.gate.bias"),
    "correction bias": (
        "mlp.gate.e_score_correction_bias",
        "mlp.e_score_correction_bias",
        "block_sparse_moe.e_score_correction_bias",
        "mlp.moe_statics.e_score_correction_bias",
        "mlp.experts.e_score_correction_bias",
        "mlp.expert_bias",
        "feed_forward.expert_bias",
        "moe.router.expert_bias",
        "mlp.gate.bias",
    ),
}
"""The common ones of the names that the patterns accept, for error messages."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class GateReader:
    """The gates of one checkpoint, found once by tensor name and read layer by layer.

    A weight already in the right dtype stays a view of the memory-mapped file, as in transformers:
    in fp32 the product of a single row depends on how its weight is aligned in memory.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = gate_names(checkpoint.names())

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have a gate, ascending; a dense layer has none."""
        return tuple(layer for layer, names in self._names.items() if "gate weight" in names)

    def read(self, layer: int, spec: RoutingSpec, dtype: torch.dtype) -> GateWeights:
        """The gate of one layer.

        Args:
            spec: says which biases there are, and what stays fp32 in a model of another dtype.
            dtype: the model's.

        Raises:
            UnsupportedCheckpoint: no such tensor, several, or of a shape or dtype that does not
                fit; names the layer and the tensors.
        """
        names = self._names.get(layer, {})
        weight_dtype = torch.float32 if spec.gate_dtype == "fp32" else dtype
        weight_ED = self._one(layer, "gate weight", names, weight_dtype)
        _check_experts(f"layer {layer}: gate weight", weight_ED, weight_ED.shape[0], spec)
        bias_E = correction_E = None
        if spec.linear_bias:
            bias_E = self._bias(layer, "gate bias", names, spec, dtype)
        if spec.correction_bias:
            # deepseek_v4 and inkling2 publish it under the name of a linear bias
            role: Role = "correction bias"
            if role not in names and "gate bias" in names:
                role = "gate bias"
            correction_dtype = torch.float32 if spec.correction_dtype == "fp32" else dtype
            correction_E = self._bias(layer, role, names, spec, correction_dtype)
        return GateWeights(weight_ED, bias_E, correction_E)

    def _bias(
        self, layer: int, role: Role, names: GateNames, spec: RoutingSpec, dtype: torch.dtype
    ) -> torch.Tensor:
        bias = self._one(layer, role, names, dtype)
        _check_experts(f"layer {layer}: {role}", bias, bias.numel(), spec)
        return bias.reshape(-1)  # ernie4_5_moe keeps it as [1, E]

    def _one(self, layer: int, role: Role, names: GateNames, dtype: torch.dtype) -> torch.Tensor:
        found = names.get(role, [])
        if len(found) != 1:
            raise _not_one(layer, role, found)
        tensor = self._checkpoint.tensor(found[0])
        if tensor.dtype not in _FLOATS:
            known = ", ".join(map(dtype_name, _FLOATS))
            got = dtype_name(tensor.dtype)
            raise UnsupportedCheckpoint(
                f"{found[0]}: expected one of {known}, got {got}. Quantised gates are not read.",
                tensor=found[0],
            )
        return tensor.to(dtype)


def _not_one(layer: int, role: Role, found: list[str]) -> UnsupportedCheckpoint:
    if found:
        text = f"layer {layer}: expected one {role}, found {', '.join(found)}."
    else:
        tried = ", ".join(_TRIED[role])
        text = f"layer {layer} has no {role}: none of *.layers.{layer}.{{{tried}}} is there."
    return UnsupportedCheckpoint(text, layer=layer, tensor=role)


def _check_experts(name: str, tensor: torch.Tensor, num_rows: int, spec: RoutingSpec) -> None:
    if num_rows != spec.num_experts:
        shape = list(tensor.shape)
        raise UnsupportedCheckpoint(
            f"{name}: expected {spec.num_experts} experts as in config.json, got shape {shape}.",
            tensor=name,
        )
