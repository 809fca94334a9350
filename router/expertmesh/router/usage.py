"""How often each expert was used: rows per layer and expert since the process started."""

from collections.abc import Mapping, Sequence

from expertmesh.v1 import control_pb2


class ExpertUsage:
    """Counts routed rows.

    Args:
        num_experts: experts of each MoE layer.
    """

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        self._rows = {layer: [0] * count for layer, count in num_experts.items()}

    def count(self, layer: int, slots: Mapping[int, Sequence[int]]) -> None:
        """Add the slots of each expert of one call."""
        rows = self._rows[layer]
        for expert, own in slots.items():
            rows[expert] += len(own)

    def to_proto(self) -> control_pb2.GetExpertUsageResponse:
        """The counts of all layers, ascending."""
        layers = [
            control_pb2.LayerUsage(layer=layer, rows=rows)
            for layer, rows in sorted(self._rows.items())
        ]
        return control_pb2.GetExpertUsageResponse(layers=layers)
