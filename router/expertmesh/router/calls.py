"""What a layer call is, and what it asks of the mesh and tells it.

T tokens, D hidden size, S slots (T * K).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

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


@dataclass(frozen=True)
class LayerCall:
    """What is to be computed, and where it goes."""

    layer: int
    hidden_TD: torch.Tensor
    experts_S: Sequence[int]
    outputs_SD: torch.Tensor
    origin: Origin = ANYONE
    """Whose rows they are and how urgent."""

    @property
    def top_k(self) -> int:
        """Slots of each token."""
        return len(self.experts_S) // self.hidden_TD.shape[0]

    @cached_property
    def form(self) -> RowForm:
        """What its rows look like."""
        dtype, size = self.hidden_TD.dtype, self.hidden_TD.shape[1]
        return RowForm(wire_dtype(dtype, "hidden.dtype"), size, size * dtype.itemsize)
