"""Does the steps of a move one after the other, so that it may end anywhere.

Before the first step and after each the move, as far as it is still to be done, is written to
Redis, by the lease's holder only. After every step each expert has a ready copy, so a controller
that dies leaves a mesh that serves. The next one reads what is left and does it: a step that is
done already does nothing.
"""

import logging
from collections.abc import Callable

from expertmesh.runtime.errors import ExpertMeshError, StaleController
from expertmesh.runtime.state import Lease
from expertmesh.services.controller.mesh import Replicas
from expertmesh.v1 import placement_pb2 as pb

logger = logging.getLogger(__name__)

MOVE_KEY = "move"


class Executor:
    """Of the controller that holds the lease.

    Args:
        linger_s: see `ControllerSettings`.
        step_timeout_s: of one step.
        at: told what happens next; a test's hook to end the process there.
    """

    def __init__(
        self,
        replicas: Replicas,
        lease: Lease,
        linger_s: float,
        step_timeout_s: float,
        at: Callable[[str], None] = lambda point: None,
    ) -> None:
        self._replicas, self._lease = replicas, lease
        self._linger_s, self._step_timeout_s = linger_s, step_timeout_s
        self._at = at

    async def run(self, move: pb.PlacementMove) -> str:
        """Do what is left of a move; what became of it, in words. Every outcome leaves a placement
        that serves."""
        left = pb.PlacementMove()
        left.CopyFrom(move)
        try:
            await self._write(left)
            self._at("written")
            while left.steps:
                await self._step(left.steps[0])
                del left.steps[0]
                await self._write(left)
                self._at(f"{len(left.steps)} steps left")
        except (ExpertMeshError, TimeoutError) as error:
            reason = getattr(error, "message", "") or "it took too long"
            logger.warning("a move is given up with %d steps left: %s", len(left.steps), reason)
            await self._lease.write(MOVE_KEY, b"")
            return f"given up with {len(left.steps)} steps left: {reason}"
        return "done"

    async def left_over(self) -> pb.PlacementMove:
        """What an earlier controller did not finish; a move without steps if it left nothing."""
        return pb.PlacementMove.FromString(await self._lease.read(MOVE_KEY))

    async def _step(self, step: pb.PlacementStep) -> None:
        try:
            await self._do(step)
        except StaleController as error:  # Redis had lost its memory if the lease is ours
            seen = int(error.fields.get("seen", "0"))
            if not await self._lease.outbid(seen):
                raise
            await self._do(step)

    async def _do(self, step: pb.PlacementStep) -> None:
        epoch = self._lease.epoch
        if not epoch:
            raise StaleController("this controller has lost its lease")
        what = "add" if step.add else "drop"
        self._at(f"before {what}")
        if step.add:
            await self._replicas.add(step, epoch, self._step_timeout_s)
        else:
            await self._replicas.drop(step, epoch, self._linger_s, self._step_timeout_s)
        self._at(f"after {what}")

    async def _write(self, left: pb.PlacementMove) -> None:
        value = left.SerializeToString() if left.steps else b""
        if not await self._lease.write(MOVE_KEY, value):
            raise StaleController("this controller has lost its lease, or Redis is away")
