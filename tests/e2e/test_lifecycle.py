"""Ray Serve owns the replicas: limits change without a restart, and shrinking loses no row."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

import pytest
import torch
from tests.checkpoints import tiny_checkpoint
from tests.e2e.cluster import Cluster

from expertmesh.client.router import RouterClient
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.services.serve_config import EXPERTS_IMPORT_PATH, application
from expertmesh.v1 import control_pb2

MODEL = "lifecycle"
NUM_CALLERS = 4
DEADLINE_S = 90.0
HIDDEN = 64

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Mesh:
    """One group of everything, deployed, and a router to it."""

    cluster: Cluster
    args: ExpertGroupArgs
    router: str

    def change(self, *, num_replicas: int, max_batch_rows: int) -> None:
        """Deploy the group again with these; nothing else differs."""
        deployment = {
            "name": self.args.group,
            "num_replicas": num_replicas,
            "user_config": {"max_batch_rows": max_batch_rows},
        }
        changed = application(self.args.group, EXPERTS_IMPORT_PATH, self.args, [deployment])
        self.cluster.change(changed)

    def replicas(self) -> list[control_pb2.ReplicaState]:
        """Those that take work, as the router sees them."""
        return [
            replica.state
            for replica in self.cluster.cores[MODEL].snapshot.replicas.values()
            if replica.takes_work
        ]

    def until(self, condition: Callable[[list[control_pb2.ReplicaState]], bool]) -> None:
        """Wait until it holds of the replicas."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition(self.replicas()):
            assert time.monotonic() < deadline_s, [state.replica for state in self.replicas()]
            time.sleep(0.05)


@pytest.fixture(scope="module")
def mesh(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    path: Path = tiny_checkpoint("mixtral", tmp_path_factory.mktemp(MODEL))
    (args,) = cluster.group_args(path, MODEL, 1)
    with cluster.running([args]), cluster.router(path, MODEL) as address:
        yield Mesh(cluster, args, address)


def test_limits_change_without_a_restart(mesh: Mesh) -> None:
    (before,) = mesh.replicas()
    assert before.max_batch_rows != 17
    mesh.change(num_replicas=1, max_batch_rows=17)
    mesh.until(lambda states: [state.max_batch_rows for state in states] == [17])
    (after,) = mesh.replicas()
    assert (after.pid, after.incarnation) == (before.pid, before.incarnation)


def test_limits_that_are_wrong_harm_nobody(mesh: Mesh) -> None:
    """Serve would kill a replica that raised."""
    (before,) = mesh.replicas()
    mesh.change(num_replicas=1, max_batch_rows=0)
    with RouterClient(mesh.router) as client:
        for _ in range(20):
            assert client.forward(0, torch.ones(1, HIDDEN)).hidden_TD.shape == (1, HIDDEN)
            time.sleep(0.1)  # for about as long as a right change takes, several times over
    mesh.change(num_replicas=1, max_batch_rows=19)
    mesh.until(lambda states: [state.max_batch_rows for state in states] == [19])
    (after,) = mesh.replicas()
    assert (after.pid, after.incarnation) == (before.pid, before.incarnation)


@contextmanager
def calling(mesh: Mesh) -> Iterator[None]:
    """Callers keep calling; every answer is right, or the block's end raises."""
    hidden_TD = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(0))
    stop = Event()
    with RouterClient(mesh.router) as client:
        expected_TD = client.forward(0, hidden_TD).hidden_TD

        def call_until_stopped(_: int) -> int:
            num_calls = 0
            while not stop.is_set():
                got_TD = client.forward(0, hidden_TD).hidden_TD
                torch.testing.assert_close(got_TD, expected_TD, rtol=0, atol=1e-5)
                num_calls += 1
            return num_calls

        with ThreadPoolExecutor(NUM_CALLERS) as threads:
            counts = threads.map(call_until_stopped, range(NUM_CALLERS))
            try:
                yield
            finally:
                stop.set()
            assert sum(counts) > 100


def test_growing_and_shrinking_under_load_loses_nothing(mesh: Mesh) -> None:
    """1 -> 2 -> 1."""
    with calling(mesh):
        mesh.change(num_replicas=2, max_batch_rows=17)
        mesh.until(lambda states: len(states) == 2)
        mesh.until(lambda states: all(state.load.done_rows > 100 for state in states))
        mesh.change(num_replicas=1, max_batch_rows=17)
        mesh.until(lambda states: len(states) == 1)


def test_other_arguments_replace_the_replica_and_lose_nothing(mesh: Mesh) -> None:
    """The new one comes before the old one goes."""
    (before,) = mesh.replicas()
    changed = replace(mesh, args=mesh.args.model_copy(update={"max_message_bytes": 1 << 24}))
    with calling(mesh):
        changed.change(num_replicas=1, max_batch_rows=17)
        mesh.until(lambda states: all(state.replica != before.replica for state in states))
        assert len(mesh.replicas()) == 1
        mesh.until(lambda states: all(state.load.done_rows > 100 for state in states))
