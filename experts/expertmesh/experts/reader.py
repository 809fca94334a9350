"""Reads single experts out of a checkpoint: only their bytes, as views unless they are quantised.

Shapes: D hidden size, F FFN size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from expertmesh.experts.expert_spec import ExpertSpec, declared_num_experts, declared_num_layers
from expertmesh.experts.layouts import ExpertIndex, Family, LayerLayout, Part, index_experts
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.errors import UnknownExpert, UnsupportedCheckpoint

if TYPE_CHECKING:  # what only looks at headers starts without torch
    import torch

_QUANT_METHODS = ("fp8", "mxfp4")
_FLOATS = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}
_AS_THEY_LIE = (Family.FUSED, Family.FUSED_TRANSPOSED, Family.STACKED)


@dataclass(frozen=True)
class ExpertTensors:
    """One expert with weights [out, in], whatever the layout they are views of.

    gate and the biases are None where the family has none.
    """

    up: torch.Tensor
    """[F, D]"""
    down: torch.Tensor
    """[D, F]"""
    gate: torch.Tensor | None = None
    """[F, D]"""
    gate_bias: torch.Tensor | None = None
    """[F]"""
    up_bias: torch.Tensor | None = None
    """[F]"""
    down_bias: torch.Tensor | None = None
    """[D]"""

    def named(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by field name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class ExpertShape:
    """The size of each expert of one layer."""

    hidden_size: int
    ffn_size: int
    gated: bool
    biased: bool

    @property
    def num_parameters(self) -> int:
        """Weights and biases of one expert."""
        num_up = 2 if self.gated else 1
        weights = (num_up + 1) * self.hidden_size * self.ffn_size
        return weights + (num_up * self.ffn_size + self.hidden_size if self.biased else 0)


class ExpertReader:
    """The routed experts of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Indexes the experts by name and header; no weight is read.

        Raises:
            UnsupportedCheckpoint: a model type, quantisation or layout this version does not read.
        """
        self.checkpoint = checkpoint
        self.spec = ExpertSpec.from_config(checkpoint.text_config)
        self._block = _fp8_block(checkpoint)
        self.index: ExpertIndex = index_experts(
            {name: checkpoint.shape(name) for name in checkpoint.names()},
            num_layers=declared_num_layers(checkpoint.text_config),
            num_experts=declared_num_experts(checkpoint.text_config),
        )
        for layout in self.index.layers.values():
            _check_dtypes(checkpoint, layout)

    def layers(self) -> list[int]:
        """The decoder layers that have routed experts, ascending."""
        return sorted(self.index.layers)

    def num_experts(self, layer: int) -> int:
        """Routed experts of a layer. Raises UnknownExpert for a layer without."""
        return self._layout(layer).num_experts

    def expert_shape(self, layer: int) -> ExpertShape:
        """The size of every expert of a layer. Raises UnknownExpert for a layer without."""
        layout = self._layout(layer)
        return ExpertShape(layout.hidden_size, layout.ffn_size, layout.gated, layout.biased)

    def expert_bytes(self, layer: int, dtype: torch.dtype) -> int:
        """Bytes of one expert of a layer once it is held in `dtype`."""
        return self.expert_shape(layer).num_parameters * dtype.itemsize

    def memory_offsets(self, layer: int, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes past a page boundary at which transformers has the up and the down weights.

        It computes on the mapped file when layout and dtype are already its own, and the bits of a
        float32 product depend on the alignment; otherwise it has memory of its own: (0, 0).
        """
        layout = self._layout(layer)
        if layout.family not in _AS_THEY_LIE:
            return 0, 0
        keys = layout.parts[0]
        up = keys.get(("gate_up", "weight")) or keys["up", "weight"]
        if _FLOATS[self.checkpoint.dtype(up)] != str(dtype):
            return 0, 0
        down = keys["down", "weight"]
        return self.checkpoint.offset_bytes(up), self.checkpoint.offset_bytes(down)

    def load(self, layer: int, expert: int, dtype: torch.dtype | None = None) -> ExpertTensors:
        """One expert, as views of the mapped files; copy what must outlive a change of the files.

        Args:
            dtype: of weights that are quantised on disk, bfloat16 if not given; others stay in the
                type they have there.

        Raises:
            UnknownExpert: no such layer or expert.
        """
        from torch import bfloat16

        dtype = dtype or bfloat16
        layout = self._layout(layer)
        if not 0 <= expert < layout.num_experts:
            raise UnknownExpert(
                f"layer {layer} has experts 0 to {layout.num_experts - 1}, not {expert}.",
                layer=layer,
                expert=expert,
            )
        match layout.family:
            case Family.PER_EXPERT | Family.PER_EXPERT_FP8:
                return self._load_separate(layout, expert, dtype)
            case Family.STACKED:
                return self._load_stacked(layout, expert)
            case Family.FUSED | Family.FUSED_TRANSPOSED | Family.MXFP4:
                return self._load_fused(layout, expert, dtype)

    def check_still_there(self, layer: int, expert: int) -> None:
        """Raises DamagedShard if a file that `load` would read has been cut off since."""
        layout = self._layout(layer)
        separate = layout.family in (Family.PER_EXPERT, Family.PER_EXPERT_FP8)
        keys = layout.keys_of(expert) if separate else layout.parts[0]
        self.checkpoint.check_still_there(keys.values())

    def _layout(self, layer: int) -> LayerLayout:
        if layer not in self.index.layers:
            raise UnknownExpert(
                f"layer {layer} has no routed experts; layers with experts: {self.layers()}.",
                layer=layer,
            )
        return self.index.layers[layer]

    def _load_separate(self, layout: LayerLayout, expert: int, dtype: torch.dtype) -> ExpertTensors:
        keys = layout.keys_of(expert)

        def weight(projection: str) -> torch.Tensor:
            raw = self.checkpoint.tensor(keys[projection, "weight"])
            if (projection, "scale") not in keys:
                return raw
            from expertmesh.experts.dequant import dequantise_fp8

            scale = self.checkpoint.tensor(keys[projection, "scale"])
            return dequantise_fp8(raw, scale, dtype, self._block)

        gate = weight("gate") if layout.gated else None
        return ExpertTensors(up=weight("up"), down=weight("down"), gate=gate)

    def _load_stacked(self, layout: LayerLayout, expert: int) -> ExpertTensors:
        start = expert * layout.ffn_size
        gate, up, down = (
            self.checkpoint.rows(layout.parts[0][part, "weight"], start, start + layout.ffn_size)
            for part in ("gate", "up", "down")
        )
        return ExpertTensors(up=up, down=down.t(), gate=gate)

    def _load_fused(self, layout: LayerLayout, expert: int, dtype: torch.dtype) -> ExpertTensors:
        down = self._fused_weight(layout, "down", expert, dtype)
        down_bias = self._row(layout, ("down", "bias"), expert)
        if not layout.gated:
            up = self._fused_weight(layout, "up", expert, dtype)
            up_bias = self._row(layout, ("up", "bias"), expert)
            return ExpertTensors(up=up, down=down, up_bias=up_bias, down_bias=down_bias)
        gate, up = split_gate_up(
            self._fused_weight(layout, "gate_up", expert, dtype), self.spec.interleaved
        )
        bias = self._row(layout, ("gate_up", "bias"), expert)
        gate_bias, up_bias = (
            (None, None) if bias is None else split_gate_up(bias, self.spec.interleaved)
        )
        return ExpertTensors(up, down, gate, gate_bias, up_bias, down_bias)

    def _fused_weight(
        self, layout: LayerLayout, projection: str, expert: int, dtype: torch.dtype
    ) -> torch.Tensor:
        keys = layout.parts[0]
        if layout.family is Family.MXFP4:
            from expertmesh.experts.dequant import dequantise_mxfp4

            blocks = self.checkpoint.row(keys[projection, "blocks"], expert)
            scales = self.checkpoint.row(keys[projection, "scales"], expert)
            return dequantise_mxfp4(blocks, scales, dtype)
        weight = self.checkpoint.row(keys[projection, "weight"], expert)
        return weight.t() if layout.family is Family.FUSED_TRANSPOSED else weight

    def _row(self, layout: LayerLayout, part: Part, expert: int) -> torch.Tensor | None:
        key = layout.parts[0].get(part)
        return None if key is None else self.checkpoint.row(key, expert)


def split_gate_up(tensor: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up as views of a tensor that holds both along its first dimension."""
    if interleaved:
        return tensor[0::2], tensor[1::2]
    gate, up = tensor.chunk(2, dim=0)
    return gate, up


def _check_dtypes(checkpoint: Checkpoint, layout: LayerLayout) -> None:
    """Every weight is floating point, or FP8 with its scale: nothing quantised passes as plain."""
    for keys in layout.parts:
        for (projection, kind), key in keys.items():
            dtype = checkpoint.dtype(key)
            scaled = dtype == "F8_E4M3" and (projection, "scale") in keys
            if kind in ("weight", "bias") and dtype not in _FLOATS and not scaled:
                raise UnsupportedCheckpoint(
                    f"{key}: expected {', '.join(_FLOATS)}, or F8_E4M3 with weight_scale_inv; got "
                    f"{dtype}.",
                    key=key,
                    dtype=dtype,
                )


def _fp8_block(checkpoint: Checkpoint) -> tuple[int, int]:
    """Block size of FP8 weights, after checking that the quantisation is one we read."""
    quantization = checkpoint.config.get("quantization_config") or checkpoint.text_config.get(
        "quantization_config"
    )
    if not quantization:
        return 128, 128
    method = quantization.get("quant_method")
    if method not in _QUANT_METHODS:
        raise UnsupportedCheckpoint(
            f"config.json: quantization_config.quant_method {method!r} is not supported. "
            f"Supported: {', '.join(_QUANT_METHODS)}, or weights that are not quantised.",
            quant_method=method,
        )
    rows, columns = quantization.get("weight_block_size") or (128, 128)
    return rows, columns
