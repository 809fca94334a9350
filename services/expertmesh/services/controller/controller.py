"""One controller: holds the lease, counts rows by window, plans, tells, and moves if it may."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from expertmesh.router.moves import Move
from expertmesh.router.popularity import Popularity
from expertmesh.router.replan import Proposal, Replanner
from expertmesh.runtime.errors import ExpertMeshError, StaleController
from expertmesh.runtime.state import Lease
from expertmesh.runtime.tasks import end
from expertmesh.services.controller.executor import Executor
from expertmesh.services.controller.mesh import Replicas
from expertmesh.services.controller.world import (
    Rows,
    Seen,
    World,
    batch_time_us,
    num_experts,
    rows_so_far,
    step_to_proto,
    window_rows,
    world_of,
)
from expertmesh.services.settings import ControllerSettings
from expertmesh.v1 import placement_pb2 as pb

logger = logging.getLogger(__name__)

PLAN_KEY = "plan"
_RENEWALS = 4
"""Within the time of a lease."""


class Controller:
    """Runs until cancelled.

    Args:
        at: see `Executor`.
    """

    def __init__(
        self,
        settings: ControllerSettings,
        replicas: Replicas,
        lease: Lease,
        at: Callable[[str], None] = lambda point: None,
    ) -> None:
        self._settings, self._replicas, self._lease = settings, replicas, lease
        self._executor = Executor(replicas, lease, settings.linger_s, settings.step_timeout_s, at)
        self._replanner = Replanner(settings)
        self._popularity: Popularity | None = None
        self._rows: Rows = {}
        self._times_us: dict[str, float] = {}
        self._reigned = 0
        """The epoch in which this controller last did something."""
        self.plan = pb.PlacementPlan(reason="no window has passed yet")
        """The newest."""

    async def run(self) -> None:
        """Keep the lease or wait for it, and act while it is held."""
        renewing = asyncio.create_task(self._renew(), name="controller-lease")
        try:
            while True:
                await asyncio.sleep(self._settings.window_s if self._reigned else self._pause_s)
                await self._window()
        finally:
            await end(renewing)

    @property
    def _pause_s(self) -> float:
        return self._settings.lease_s / _RENEWALS

    async def _renew(self) -> None:
        while True:
            await self._lease.refresh()
            await asyncio.sleep(self._pause_s)

    async def _window(self) -> None:
        epoch = self._lease.epoch
        try:
            if not epoch:
                self._stand_by()
            elif self._reigned != epoch:
                await self._take_over(epoch)
                self._reigned = epoch
            else:
                await self._act(epoch)
        except StaleController as error:
            logger.warning("%s", error.message)
            if not await self._lease.outbid(int(error.fields.get("seen", "0"))):
                self._stand_by()
        except ExpertMeshError as error:
            logger.warning("nothing is planned in this window: %s", error.message)
        except Exception:
            logger.exception("the controller: a bug; going on with the next window")

    def _stand_by(self) -> None:
        self._reigned = 0
        self.plan = pb.PlacementPlan(reason="another controller holds the lease")

    async def _take_over(self, epoch: int) -> None:
        """Let replicas hear of the new epoch, and finish what was begun."""
        self._replanner.forget()
        self._rows = rows_so_far(await self._replicas.survey(epoch))
        left = await self._executor.left_over()
        if left.steps and self._settings.mode == "execute":
            logger.info("an earlier controller has left %d steps of a move", len(left.steps))
            self.plan.last_move = await self._executor.run(left)

    async def _act(self, epoch: int) -> None:
        seen = await self._replicas.survey(epoch)
        # in a thread: searching moves may take longer than the lease lasts
        world, proposal = await asyncio.to_thread(self._decide, seen)
        moves = [_to_proto(move, world) for move in proposal.moves]
        self.plan = self._plan(epoch, proposal, moves)
        await self._record()
        if moves:
            logger.info("%s: %d moves proposed", proposal.reason, len(moves))
        if self._settings.mode == "execute":
            await self._execute(moves)

    def _decide(self, seen: Sequence[Seen]) -> tuple[World, Proposal]:
        counts = num_experts(seen)
        if self._popularity is None or counts.keys() - self._popularity.layers.keys():
            self._popularity = Popularity(counts, self._settings.half_life_windows)
        rows = rows_so_far(seen)
        self._popularity.observe(window_rows(self._rows, rows, counts))
        self._rows = rows
        world = world_of(seen, self._times(seen))
        if not world.names:
            return world, Proposal({}, (), "no replica answers", {})
        if world.missing:
            layer, expert = world.missing[0]
            reason = f"layer {layer}, expert {expert} has no replica that answers"
            return world, Proposal({}, (), reason, {})
        return world, self._replanner.decide(self._popularity, world.speeds, world.holdings)

    def _times(self, seen: Sequence[Seen]) -> list[float]:
        """What the same work takes each replica, by an average over windows; 0: not known."""
        if self._settings.speeds == "equal":
            return [0.0] * len(seen)
        share = 1 - 0.5 ** (1 / self._settings.half_life_windows)
        fresh = {}
        for one in seen:
            time_us, name = batch_time_us(one.state.load), one.state.replica
            old_us = self._times_us.get(name, time_us)
            fresh[name] = old_us + share * (time_us - old_us)
        self._times_us = fresh
        return list(fresh.values())

    async def _execute(self, moves: Sequence[pb.PlacementMove]) -> None:
        for move in moves:
            self.plan.under_way.CopyFrom(move)
            await self._record()
            self.plan.last_move = await self._executor.run(move)
            self.plan.ClearField("under_way")
            await self._record()
            if self.plan.last_move != "done":  # the others were planned on its outcome
                return

    def _plan(
        self, epoch: int, proposal: Proposal, moves: Sequence[pb.PlacementMove]
    ) -> pb.PlacementPlan:
        return pb.PlacementPlan(
            epoch=epoch,
            window=self.plan.window + 1,
            executes=self._settings.mode == "execute",
            reason=proposal.reason,
            layers=[
                pb.LayerBalance(
                    layer=layer,
                    ratio=view.ratio,
                    noise=view.noise,
                    bad_windows=view.bad_windows,
                    bound=view.bound,
                    ratio_after=proposal.expected.get(layer, 0.0),
                )
                for layer, view in sorted(proposal.layers.items())
            ],
            moves=moves,
            last_move=self.plan.last_move,
        )

    async def _record(self) -> None:
        await self._lease.write(PLAN_KEY, self.plan.SerializeToString())


def _to_proto(move: Move, world: World) -> pb.PlacementMove:
    return pb.PlacementMove(
        steps=[step_to_proto(step, world.names) for step in move.steps],
        gain_frac=move.gain_frac,
        num_bytes=move.num_bytes,
    )
