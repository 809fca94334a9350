"""The rule of scaling on Ray Serve: a busy group grows, a calm one shrinks, and nobody notices."""

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from tests.checkpoints import tiny_checkpoint
from tests.e2e.cluster import Cluster

from expertmesh.client.router import RouterClient
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.router.snapshot import Life, Replica
from expertmesh.runtime.state.scaling import ScalingBoard
from expertmesh.services.serve_config import EXPERTS_IMPORT_PATH, application, replicas_of
from expertmesh.services.settings import ExpertsSettings, ScalingSettings
from expertmesh.v1 import control_pb2

MODEL = "scaling"
HOT, BROKEN = f"{MODEL}-g0", f"{MODEL}-g1"
DEADLINE_S = 120.0
HIDDEN = 64
RULE = {
    "mode": "on",
    "max_replicas": 2,
    "target_busy_frac": 0.1,  # of a core that these tests share with much else
    "max_queue_delay_s": 30.0,
    "up_window_s": 1.0,
    "down_window_s": 3.0,
    "lead_s": 0.0,
    "within_machines": False,
}

pytestmark = pytest.mark.timeout(400)


def deployment_of(args: ExpertGroupArgs, **changes: Any) -> dict[str, Any]:
    """What Serve's config says of it."""
    scaling = ScalingSettings(**{**RULE, **changes})
    return replicas_of(ExpertsSettings(scaling=scaling), args, 1)


@dataclass(frozen=True)
class Mesh:
    """Two groups; the policy of the second cannot start."""

    cluster: Cluster
    hot: ExpertGroupArgs
    router: str

    def _working(self) -> list[Replica]:
        replicas = self.cluster.cores[MODEL].snapshot.replicas.values()
        return [own for own in replicas if own.takes_work]

    def replicas(self) -> Counter[str]:
        """How many take work, by group, as the router sees them."""
        return Counter(own.state.group for own in self._working())

    def lives(self, group: str) -> list[Life]:
        """Which processes take work."""
        return sorted(own.life for own in self._working() if own.state.group == group)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline_s, (self.replicas(), self.decisions())
            time.sleep(0.05)

    def decisions(self) -> dict[str, control_pb2.GroupScaling]:
        """The newest of each group."""

        async def read() -> dict[str, control_pb2.GroupScaling]:
            async with ScalingBoard(self.hot.redis_url, MODEL) as board:
                return {decision.group: decision for decision in await board.read()}

        return self.cluster.loop.run(read())

    def order(self, replicas: int | None) -> None:
        """By hand, or back to the rule."""

        async def set_it() -> None:
            async with ScalingBoard(self.hot.redis_url, MODEL) as board:
                if replicas is None:
                    await board.release(HOT)
                else:
                    await board.set_replicas(HOT, replicas, 600_000)

        self.cluster.loop.run(set_it())

    def change(self, **changes: Any) -> None:
        """Deploy the first group again with another rule."""
        own = {"name": HOT, **deployment_of(self.hot, **changes)}
        self.cluster.change(application(HOT, EXPERTS_IMPORT_PATH, self.hot, [own]))


@pytest.fixture(scope="module")
def mesh(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    path: Path = tiny_checkpoint("mixtral", tmp_path_factory.mktemp(MODEL))
    groups = cluster.group_args(path, MODEL, 2, deterministic=True)
    deployments = {args.group: deployment_of(args) for args in groups}
    broken = copy.deepcopy(deployments[BROKEN])
    broken["autoscaling_config"]["policy"]["policy_kwargs"]["redis_url"] = "nonsense://"
    deployments[BROKEN] = broken
    with cluster.running(groups, deployments), cluster.router(path, MODEL) as address:
        yield Mesh(cluster, groups[0], address)


class Callers:
    """Call the experts of one group for as long as the block lasts; every answer is compared."""

    def __init__(self, router: str) -> None:
        self._router = router
        self.pause_s = 0.0
        self.num_calls = 0

    def call_until(self, stop: Event) -> None:
        random = torch.Generator().manual_seed(0)
        hidden_TD = torch.randn(6, HIDDEN, generator=random)
        experts_TK = torch.stack([torch.randperm(4, generator=random)[:2] for _ in range(6)])
        weights_TK = torch.rand(6, 2, generator=random)
        with RouterClient(self._router) as client:
            expected_TD = client.dispatch(0, hidden_TD, experts_TK, weights_TK)
            while not stop.is_set():
                got_TD = client.dispatch(0, hidden_TD, experts_TK, weights_TK)
                assert torch.equal(got_TD, expected_TD)
                self.num_calls += 1
                time.sleep(self.pause_s)


@contextmanager
def calling(router: str, num: int = 3) -> Iterator[Callers]:
    """Several callers; what failed for one of them is raised at the end."""
    callers, stop = Callers(router), Event()
    with ThreadPoolExecutor(num) as threads:
        running = [threads.submit(callers.call_until, stop) for _ in range(num)]
        try:
            yield callers
        finally:
            stop.set()
        for one in running:
            one.result()


def test_a_busy_group_grows_alone_and_shrinks_when_it_is_calm(mesh: Mesh) -> None:
    """Callers go on all the while; not one call fails, not one bit differs."""
    mesh.until(lambda: mesh.replicas() == {HOT: 1, BROKEN: 1})
    with calling(mesh.router) as callers:
        mesh.until(lambda: mesh.replicas()[HOT] == 2)
        before = callers.num_calls
        mesh.until(lambda: callers.num_calls > before + 100)
        assert mesh.decisions()[HOT].wanted == 2
        callers.pause_s = 0.3
        mesh.until(lambda: mesh.replicas()[HOT] == 1)
        before = callers.num_calls
        mesh.until(lambda: callers.num_calls > before + 10)
    assert mesh.replicas()[BROKEN] == 1


def test_a_number_set_by_hand_counts_until_it_is_taken_back(mesh: Mesh) -> None:
    mesh.until(lambda: mesh.replicas()[HOT] == 1)
    mesh.order(2)
    mesh.until(lambda: mesh.replicas()[HOT] == 2)
    assert mesh.decisions()[HOT].override.replicas == 2
    mesh.order(None)
    mesh.until(lambda: mesh.replicas()[HOT] == 1)


def test_a_rule_changes_and_advises_without_a_restart(mesh: Mesh) -> None:
    mesh.until(lambda: mesh.replicas()[HOT] == 1)
    lives = mesh.lives(HOT)
    mesh.change(mode="advisory", max_replicas=3)
    advised = control_pb2.SCALING_MODE_ADVISORY
    mesh.until(lambda: mesh.decisions().get(HOT, control_pb2.GroupScaling()).mode == advised)
    with calling(mesh.router):
        mesh.until(lambda: mesh.decisions()[HOT].wanted > 1)
        assert mesh.decisions()[HOT].max_replicas == 3
    assert mesh.lives(HOT) == lives, "it is still the same process, and alone"


def test_a_policy_that_cannot_start_harms_nobody(mesh: Mesh) -> None:
    """Its group keeps its replicas; the others were scaled by the same controller meanwhile."""
    assert BROKEN not in mesh.decisions()
    assert mesh.replicas()[BROKEN] == 1
