"""What a router knows of the model it serves: layers, experts, gates. Read from headers and gates
alone; no expert weight and no dense weight is touched.

Shapes: E experts, D hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch

from expertmesh.router.combine import CombineMode
from expertmesh.router.families import routing_spec
from expertmesh.router.gate import GateWeights
from expertmesh.router.gate_weights import GateReader
from expertmesh.router.routing_spec import RoutingSpec
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.errors import ExpertMeshError, UnknownExpert
from expertmesh.runtime.gate_names import gate_names
from expertmesh.runtime.tensors import wire_dtype
from expertmesh.v1 import router_pb2


@dataclass(frozen=True)
class Gate:
    """One layer's gate."""

    spec: RoutingSpec
    weights: GateWeights


class ServedModel:
    """One model of the router.

    Args:
        name: its name in requests.
        config: the transformers config of the checkpoint.
        dtype: the model's compute dtype.
    """

    def __init__(self, name: str, checkpoint: Checkpoint, config: Any, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype
        self._config = config
        self._text_config = config.get_text_config()
        self._reader = GateReader(checkpoint)
        self._gates: dict[int, Gate] = {}
        self.hidden_size = int(self._text_config.hidden_size)
        self.num_experts = _num_experts(checkpoint, int(self._text_config.num_hidden_layers))

    def gate(self, layer: int) -> Gate:
        """The layer's gate, read when first asked for.

        Raises:
            UnknownExpert: the layer has no experts.
            UnsupportedCheckpoint: the family needs its own router code; `Dispatch` serves it.
        """
        if layer not in self.num_experts:
            known = ", ".join(map(str, self.num_experts))
            raise UnknownExpert(f"layer {layer}: the model's MoE layers are {known}", layer=layer)
        if layer not in self._gates:
            spec = routing_spec(self._config, layer)
            self._gates[layer] = Gate(spec, self._reader.read(layer, spec, self.dtype))
        return self._gates[layer]

    def combine_mode(self, layer: int) -> CombineMode:
        """How transformers sums in this family by default."""
        try:
            return routing_spec(self._config, layer).combine
        except ExpertMeshError:  # a family without a RoutingSpec; all of them are slot sums
            return "slot_sum"

    def info(self) -> router_pb2.ModelInfo:
        """The model as ListModels tells it."""
        unavailable = ""
        top_k = 0
        try:
            top_k = routing_spec(self._config, next(iter(self.num_experts), 0)).top_k
        except ExpertMeshError as error:
            unavailable = error.message
        return router_pb2.ModelInfo(
            name=self.name,
            model_type=self._text_config.model_type,
            layers=list(self.num_experts),
            num_experts=max(self.num_experts.values(), default=0),
            top_k=top_k,
            hidden_size=self.hidden_size,
            dtype=wire_dtype(self.dtype),
            forward_unavailable=unavailable,
        )


def _num_experts(checkpoint: Checkpoint, num_layers: int) -> dict[int, int]:
    """Experts of each MoE layer, from the gates' shapes; layers beyond predict more tokens."""
    return {
        layer: checkpoint.shape(names["gate weight"][0])[0]
        for layer, names in gate_names(checkpoint.names()).items()
        if names.get("gate weight") and layer < num_layers
    }
