"""PlacementService: what the controller asks of a replica, fenced by its epoch."""

from collections import Counter
from typing import Any

from expertmesh.experts.guests import Guests, Key
from expertmesh.experts.loading import LoadedExperts
from expertmesh.runtime.errors import StaleController
from expertmesh.v1 import placement_pb2 as pb
from expertmesh.v1 import placement_pb2_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["PlacementService"].full_name
DEFAULT_LINGER_S = 4.0
"""Routers read all records again every 1.5 s, give or take a fifth: two of those, and some more."""


class PlacementServicer(placement_pb2_grpc.PlacementServiceServicer):
    """For one replica.

    Args:
        rows: computed so far, by expert.
        incarnation: names the life of the replica that counted them.
    """

    def __init__(
        self, loaded: LoadedExperts, guests: Guests, rows: Counter[Key], incarnation: int
    ) -> None:
        self._loaded, self._guests = loaded, guests
        self._rows, self._incarnation = rows, incarnation
        self._epoch = 0

    async def Survey(self, request: pb.SurveyRequest, context: Any) -> pb.SurveyResponse:
        """What is held, what there is room for, what was computed."""
        self._obey(request.epoch)
        reader = self._loaded.reader
        return pb.SurveyResponse(
            incarnation=self._incarnation,
            holds_version=self._guests.version,
            layers=[self._layer(layer) for layer in reader.layers()],
            free_guest_bytes=max(0, self._guests.free_bytes),
        )

    def _layer(self, layer: int) -> pb.LayerSurvey:
        experts = self._loaded.experts.get(layer, ())
        return pb.LayerSurvey(
            layer=layer,
            num_experts=self._loaded.reader.num_experts(layer),
            expert_bytes=self._loaded.expert_bytes[layer],
            experts=experts,
            rows=[self._rows[layer, expert] for expert in experts],
            guests=self._guests.of(layer),
        )

    async def AddExpert(self, request: pb.AddExpertRequest, context: Any) -> pb.AddExpertResponse:
        """As `Guests.add`.

        Raises:
            StaleController: a newer controller has been here.
        """
        self._obey(request.epoch)
        await self._guests.add(request.layer, request.expert)
        return pb.AddExpertResponse(holds_version=self._guests.version)

    async def DropExpert(
        self, request: pb.DropExpertRequest, context: Any
    ) -> pb.DropExpertResponse:
        """As `Guests.drop`.

        Raises:
            StaleController: a newer controller has been here.
        """
        self._obey(request.epoch)
        linger_s = request.linger_ms / 1e3 if request.linger_ms else DEFAULT_LINGER_S
        await self._guests.drop(request.layer, request.expert, linger_s)
        return pb.DropExpertResponse(holds_version=self._guests.version)

    def _obey(self, epoch: int) -> None:
        if epoch < self._epoch:
            raise StaleController(
                f"epoch {epoch} is over: this replica has seen the controller of epoch "
                f"{self._epoch}",
                epoch=epoch,
                seen=self._epoch,
            )
        self._epoch = epoch
