"""What a layer call is, and what it asks of the mesh and tells it.

T tokens, D hidden size, S slots (T * K).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from expertmesh.router.plan import Shipment
from expertmesh.router.snapshot import Life, Replica
from expertmesh.runtime.errors import ExpertMeshError
from expertmesh.runtime.origin import ANYONE, Origin
from expertmesh.runtime.tensors import wire_dtype
from expertmesh.v1 import control_pb2, tensor_pb2


class RowForm(NamedTuple):
    """What all rows of a call look like."""

    dtype: tensor_pb2.DType.ValueType
    hidden_size: int
    row_bytes: int


Load = tuple[Life, control_pb2.ReplicaLoad, int]
"""Of which replica, and how many of our rows it has at that time."""


class Mesh(Protocol):
    """What a call needs to know of the mesh, and what it tells it."""

    def plan(
        self,
        layer: int,
        slots: Mapping[int, Sequence[int]],
        failed: Mapping[str, ExpertMeshError],
        excluded: Collection[str],
    ) -> list[Shipment]:
        """Who is to be asked for the slots; ExpertUnavailable, or why the last holder failed."""
        ...

    def replica(self, name: str) -> Replica:
        """As it is in the newest snapshot."""
        ...

    def copies(self, layer: int, shipment: Shipment) -> Sequence[Replica]:
        """Who takes work for the first of its experts; empty if nobody else does."""
        ...

    def takes_work(self, life: Life) -> bool:
        """Whether it is there and not set aside."""
        ...

    def on_loads(self, loads: Sequence[Load]) -> None:
        """Answers told how busy their replicas are."""
        ...

    def on_failure(self, replica: Replica, error: ExpertMeshError) -> bool:
        """A replica failed a call. Raises the error if others would fail it, too. Returns whether
        the replica itself may be asked again."""
        ...

    def on_silence(self, replica: Replica) -> None:
        """A replica does not answer."""
        ...


@dataclass(slots=True, eq=False)
class LayerCall:
    """What is to be computed, and where it goes."""

    layer: int
    hidden_TD: torch.Tensor
    experts_S: Sequence[int]
    outputs_SD: torch.Tensor
    origin: Origin = ANYONE
    """Whose rows they are and how urgent."""
    top_k: int = field(init=False)
    """Slots of each token."""
    form: RowForm = field(init=False)
    """What its rows look like."""

    def __post_init__(self) -> None:
        num_tokens, size = self.hidden_TD.shape
        dtype = self.hidden_TD.dtype
        self.top_k = len(self.experts_S) // num_tokens
        self.form = RowForm(wire_dtype(dtype, "hidden.dtype"), size, size * dtype.itemsize)

    def request_fields(self, model: str) -> dict[str, Any]:
        """What all its requests say, without what is as a rule left out: a field costs time even if
        it is empty."""
        fields: dict[str, Any] = {
            "model": model,
            "layer": self.layer,
            "dtype": self.form.dtype,
            "hidden_size": self.form.hidden_size,
        }
        if self.origin is not ANYONE:
            fields["caller"] = self.origin.caller
            fields["priority"] = self.origin.wire_priority
        return fields
