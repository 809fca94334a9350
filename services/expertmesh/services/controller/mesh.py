"""The controller's eyes and hands: heartbeats of replicas, and calls to their PlacementService."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc

from expertmesh.client.failures import error_of
from expertmesh.runtime.channels import connect
from expertmesh.runtime.errors import ExpertMeshError, StaleController, Unavailable
from expertmesh.runtime.security.access import PLAIN, Access
from expertmesh.services.controller.world import Seen
from expertmesh.v1 import control_pb2, placement_pb2_grpc
from expertmesh.v1 import placement_pb2 as pb

logger = logging.getLogger(__name__)

_SURVEY_TIMEOUT_S = 5.0
_POLL_S = 0.02
T = TypeVar("T")


class Replicas:
    """Replicas of the mesh by id; `on_state` and `on_gone` are for a `MeshWatcher`.

    Args:
        access: how to connect to them.
    """

    def __init__(self, access: Access = PLAIN) -> None:
        self._access = access
        self.states: dict[str, control_pb2.ReplicaState] = {}

    def on_state(self, state: control_pb2.ReplicaState) -> None:
        """A heartbeat arrived."""
        self.states[state.replica] = state

    def on_gone(self, name: str) -> None:
        """A replica left."""
        self.states.pop(name, None)

    def ready(self) -> list[control_pb2.ReplicaState]:
        """Those that take work, by name."""
        ready = control_pb2.REPLICA_STATUS_READY
        return [own for _, own in sorted(self.states.items()) if own.status == ready]

    def holders(self, layer: int, expert: int) -> list[str]:
        """Ready replicas that announce an expert."""
        return [
            state.replica
            for state in self.ready()
            if any(held.layer == layer and expert in held.experts for held in state.holds)
        ]

    async def survey(self, epoch: int) -> list[Seen]:
        """What each ready replica says of itself. Those that do not answer are left out.

        Raises:
            StaleController: some replica has seen a newer controller.
        """
        states = self.ready()

        def ask(stub: Any) -> Awaitable[pb.SurveyResponse]:
            return stub.Survey(pb.SurveyRequest(epoch=epoch), timeout=_SURVEY_TIMEOUT_S)  # type: ignore[no-any-return]

        calls = [self._call(state.address, ask) for state in states]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        found = []
        for state, answer in zip(states, answers, strict=True):
            if isinstance(answer, pb.SurveyResponse):
                found.append(Seen(state, answer))
            elif isinstance(answer, ExpertMeshError) and not isinstance(answer, StaleController):
                logger.warning("replica %s does not answer: %s", state.replica, answer.message)
            else:
                raise answer
        return found

    async def add(self, step: pb.PlacementStep, epoch: int, timeout_s: float) -> None:
        """Let a replica take an expert on, and wait until it announces it.

        Raises:
            ExpertMeshError: it cannot, or is not there any more.
        """
        request = pb.AddExpertRequest(epoch=epoch, layer=step.layer, expert=step.expert)
        await self._call(
            self._address(step.replica), lambda stub: stub.AddExpert(request, timeout=timeout_s)
        )
        async with asyncio.timeout(timeout_s):
            while step.replica not in self.holders(step.layer, step.expert):
                self._address(step.replica)
                await asyncio.sleep(_POLL_S)

    async def drop(
        self, step: pb.PlacementStep, epoch: int, linger_s: float, timeout_s: float
    ) -> None:
        """Let a replica give a guest up; returns when its memory is free.

        Raises:
            ExpertMeshError: it may not, or is not there any more.
        """
        others = [n for n in self.holders(step.layer, step.expert) if n != step.replica]
        if not others:
            raise Unavailable(
                f"layer {step.layer}, expert {step.expert}: {step.replica} has the last ready copy"
            )
        request = pb.DropExpertRequest(
            epoch=epoch,
            layer=step.layer,
            expert=step.expert,
            linger_ms=max(1, round(linger_s * 1e3)),
        )
        await self._call(
            self._address(step.replica), lambda stub: stub.DropExpert(request, timeout=timeout_s)
        )

    def _address(self, replica: str) -> str:
        state = self.states.get(replica)
        if state is None:
            raise Unavailable(f"replica {replica} is not there any more")
        return state.address

    async def _call(self, address: str, ask: Callable[[Any], Awaitable[T]]) -> T:
        async with connect(address, access=self._access) as channel:
            try:
                return await ask(placement_pb2_grpc.PlacementServiceStub(channel))
            except grpc.RpcError as failure:
                raise error_of(failure) from None
