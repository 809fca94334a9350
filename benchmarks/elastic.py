"""A step of load on one of four groups, and back: who scales, how fast, and what it costs callers.

T tokens, D hidden size, K top-k.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import slow_group
from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.elastic_load import Load, Pool, Tally
from benchmarks.harness.elastic_view import View, Watch, plot
from benchmarks.harness.mesh import MODEL, event_loop, redis_server, router_core
from benchmarks.harness.report import Bar, Report, Row
from expertmesh.experts.assignment import split_evenly
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.router.core import RouterCore
from expertmesh.runtime.state.scaling import ScalingBoard
from expertmesh.services.ray_cluster import deploy, ray_cluster, wait_running
from expertmesh.services.serve_config import application, replicas_of
from expertmesh.services.settings import ExpertsSettings, ScalingSettings

SHAPE = MoeShape(hidden_size=256, ffn_size=512)
GROUPS = 4
HOT = "g0"
TOKENS = 8
ROW_S = 0.004
BUSY_FRAC = 0.35
"""Of the one replica of each group at 1x."""
OTHERS_FRAC = 0.1
STEP = 6
_ROOT = Path(__file__).parents[1]
_START_S = 180.0
_RULE = ScalingSettings(mode="on", max_replicas=4, max_queue_delay_s=0.5, down_window_s=15.0)
_ABOUT = (
    f"{GROUPS} groups of 2 experts on Ray Serve, top-2, D={SHAPE.hidden_size}, float32, "
    f"deterministic. A replica's device takes {ROW_S * 1e3:g} ms for a row (it sleeps: replicas of "
    "one machine would share its cores). Callers come at random (Poisson), each with "
    f"{TOKENS} tokens for the two experts of one group, and wait for nobody: at 1x the replica of "
    f"{HOT} is {BUSY_FRAC:.0%} busy, of the others {OTHERS_FRAC:.0%}. Then {HOT} gets {STEP} times "
    "as many, then as many as before. Every answer is compared bit by bit with the same layer "
    f"computed in this process. The rule: {_RULE.target_busy_frac:.0%} busy, rows wait "
    f"{_RULE.max_queue_delay_s * 1e3:g} ms at most, calm for {_RULE.down_window_s:g} s before "
    "replicas go; everything else is the default. Before, "
    f"{HOT} is set to 2 by hand and released."
)


def _args(path: Path, redis_url: str) -> list[ExpertGroupArgs]:
    return [
        ExpertGroupArgs(
            group=f"g{number}",
            model_dir=str(path),
            model=MODEL,
            experts=experts,
            redis_url=redis_url,
            host="127.0.0.1",
            deterministic=True,
            log_level="WARNING",
        )
        for number, experts in enumerate(split_evenly(SHAPE.num_experts, GROUPS))
    ]


@contextmanager
def _mesh(path: Path) -> Iterator[tuple[asyncio.AbstractEventLoop, RouterCore, str]]:
    """Loop, router core and URL of Redis; the groups run on Serve."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ[slow_group.ROW_S] = str(ROW_S)
    experts = ExpertsSettings(scaling=_RULE)
    layers = {0: SHAPE.num_experts}
    with event_loop() as loop, redis_server(loop) as redis_url, ray_cluster():
        groups = _args(path, redis_url)
        applications = [
            application(
                own.group,
                slow_group.IMPORT_PATH,
                own,
                [{"name": own.group, **replicas_of(experts, own, 1)}],
            )
            for own in groups
        ]
        deploy({"proxy_location": "Disabled", "applications": applications})
        names = [own.group for own in groups]
        asyncio.run(wait_running(names, _START_S, lambda text: None))
        with router_core(loop, redis_url, layers) as caller:
            assert caller.core
            yield loop, caller.core, redis_url


class _Drill:
    """The steps, on the core's event loop."""

    def __init__(self, core: RouterCore, pool: Pool, board: ScalingBoard) -> None:
        self._view = View(core)
        self._board = board
        self.tally = Tally()
        self._rates = {
            f"g{n}": self._rate(BUSY_FRAC if f"g{n}" == HOT else OTHERS_FRAC) for n in range(GROUPS)
        }
        self._load = Load(core, pool, self._rates, self.tally)
        self.watch = Watch(self._view, self._load)
        self.marks_s: dict[str, float] = {}

    @staticmethod
    def _rate(busy_frac: float) -> float:
        """Calls a second that keep a replica so busy."""
        return busy_frac / (TOKENS * SHAPE.top_k * ROW_S)

    async def run(self, seconds: float) -> None:
        """All of it; `seconds` of the step."""
        async with self._load, self.watch:
            await self._start_one_by_hand()
            await asyncio.sleep(seconds / 4)
            await self._until(lambda: self._view.ready(HOT) == 1, "calm")
            self._mark("step up", STEP)
            await self._until(lambda: self._view.ready(HOT) > 1, "first new replica ready")
            left_s = self.marks_s["step up"] + seconds - time.monotonic()
            await asyncio.sleep(max(5.0, left_s))
            self._mark("step down", 1)
            await self._until(lambda: self._view.ready(HOT) == 1, "one replica again")
            await asyncio.sleep(5)

    async def _start_one_by_hand(self) -> None:
        """How long a replica takes from being wanted to being there."""
        started_s = time.monotonic()
        await self._order()
        await self._until(lambda: self._view.ready(HOT) == 2, "set by hand")
        self.start_s = time.monotonic() - started_s
        await self._board.release(HOT)
        await self._until(lambda: self._view.ready(HOT) == 1, "released")

    async def _order(self) -> None:
        while True:  # the first decisions are a moment away
            if any(decision.group == HOT for decision in await self._board.read()):
                return await self._board.set_replicas(HOT, 2, 600_000)
            await asyncio.sleep(0.1)

    def _mark(self, name: str, times: float) -> None:
        self._rates[HOT] = self._rate(times * BUSY_FRAC)
        self.marks_s[name] = time.monotonic()

    async def _until(self, condition: Callable[[], bool], name: str) -> None:
        end_s = time.monotonic() + _START_S
        while not condition():
            assert time.monotonic() < end_s, f"{name}: {self._view.counts()}"
            await asyncio.sleep(0.02)
        self.marks_s[name] = time.monotonic()


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_experts(SHAPE, Path(folder))
        pool = Pool(path, SHAPE, TOKENS, GROUPS)
        with _mesh(path) as (loop, core, redis_url):

            async def drill() -> _Drill:
                async with ScalingBoard(redis_url, "default") as board:
                    own = _Drill(core, pool, board)
                    await own.run(10.0 if quick else 60.0)
                    return own

            done = asyncio.run_coroutine_threadsafe(drill(), loop).result()
    return _report(done, quick)


def _report(done: _Drill, quick: bool) -> Report:
    marks_s, watch, tally = done.marks_s, done.watch, done.tally
    up_s, down_s = marks_s["step up"], marks_s["step down"]
    wanted_s = watch.wanted_more_s(HOT, up_s) - up_s
    ready_s = marks_s["first new replica ready"] - up_s
    report = Report("elastic", _ABOUT)
    most = watch.most(HOT, up_s)
    others = max(watch.most(group, 0.0) for group in watch.groups if group != HOT)
    report.bars = [
        Bar("replicas of the group at 6x", most, 3, unit="replicas"),
        Bar("replicas of any other group, ever", others, 1, True, "replicas"),
        Bar("replicas of the group at 1x again", watch.last(HOT), 1, True, "replicas"),
        Bar("first new replica ready, less its own start", wanted_s, 5, True, "s"),
        Bar("failed calls", len(tally.errors), 0, True, "calls"),
        Bar("answers with another bit", tally.inexact, 0, True, "calls"),
    ]
    again_s = marks_s["one replica again"] - down_s
    rows: list[Row] = [
        {"what": "step up until more replicas are wanted", "s": wanted_s},
        {"what": "step up until the first new replica takes rows", "s": ready_s},
        {"what": "of it that replica's start (process, imports, weights)", "s": ready_s - wanted_s},
        {"what": "before: an order by hand until a second replica takes rows", "s": done.start_s},
        {"what": "step down until there is one replica", "s": again_s},
    ]
    report.tables["Times"] = rows
    report.tables["Calls"] = [
        tally.row("1x, before", 0.0, up_s),
        tally.row("6x, until more replicas take rows", up_s, up_s + ready_s),
        tally.row("6x, afterwards", up_s + ready_s, down_s),
        tally.row("1x, until one is left, and after", down_s, float("inf")),
    ]
    report.raw = {"errors": tally.errors[:20], "replicas": watch.series(up_s)}
    if not quick:
        report.plots.append(plot("elastic.svg", watch, up_s))
    return report
