"""What happens in the rehearsal, in order. Run in namespaces of its own (`outside.command`).

Prints what was found as one line of JSON; progress goes to stderr.
"""

import json
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.rehearsal import overlay
from tests.e2e.rehearsal.callers import Callers
from tests.e2e.rehearsal.cluster import Cluster, running
from tests.e2e.rehearsal.controllers import Deployments
from tests.e2e.rehearsal.operator import Operator
from tests.e2e.rehearsal.outside import STATE
from tests.e2e.rehearsal.pods import Pod
from tests.e2e.rehearsal.raypods import quantity
from tests.e2e.rehearsal.waiting import DidNotComeError, until

START_S = 200.0
RECOVER_S = 90.0
SCALE_S = 120.0
LIGHT = (1, 0.4)
HEAVY = (4, 0.0)
CALM = (1, 3.0)


class Rehearsal:
    """A cluster with its controllers, and the steps of the story."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.operator = Operator(cluster)
        self.deployments = Deployments(cluster)
        self.found: dict[str, Any] = {}
        self._began_s = time.monotonic()
        self._problem = ""
        threading.Thread(target=self._reconcile, name="controllers", daemon=True).start()

    def _reconcile(self) -> None:
        while True:
            try:
                self.deployments.reconcile()
                self.operator.reconcile()
            except Exception:
                self._problem = traceback.format_exc()
            time.sleep(0.2)

    def say(self, text: str) -> None:
        """Progress, with seconds since the start."""
        sys.stderr.write(f"[{time.monotonic() - self._began_s:6.1f} s] {text}\n")
        sys.stderr.flush()

    def until(self, what: str, within_s: float, found: Callable[[], object]) -> float:
        """Wait; the seconds it took."""
        began_s = time.monotonic()
        until(what, within_s, found, self._instead)
        took_s = time.monotonic() - began_s
        self.say(f"{what}: after {took_s:.1f} s")
        return round(took_s, 1)

    def _instead(self) -> str:
        with self.cluster.lock:
            pods = list(self.cluster.pods.values())
        states = [f"{own.name} ready={own.ready} {own.problem} {own.restarts}" for own in pods]
        serve = {
            name: (app["status"], app.get("message", "")[-1500:])
            for name, app in self.operator.applications().items()
        }
        refused = f"refused by Serve: {self.operator.refused}\n" if self.operator.refused else ""
        return "\n".join([*states, str(serve), refused + self._problem])

    def all_ready(self, *pods: Pod) -> bool:
        """These, or all that there are."""
        with self.cluster.lock:
            own = pods or tuple(self.cluster.pods.values())
        return all(pod.ready for pod in own)

    def workers(self) -> int:
        """That the RayCluster asks for."""
        [group] = self.operator.cluster()["spec"]["workerGroupSpecs"]
        return int(group["replicas"])

    def apply(self, **scaling: Any) -> list[str]:
        """kubectl's lines for everything that changed."""
        folder = overlay.write(STATE / "overlay", **scaling)
        lines = self.cluster.kubectl("apply", "-k", str(folder)).splitlines()
        changed = [line for line in lines if not line.endswith(" unchanged")]
        self.say(f"kubectl apply: {len(lines)} objects, {len(changed)} created or configured")
        return changed

    def memory(self) -> dict[str, list[int]]:
        """Container -> MiB it takes, and its limit."""
        found: dict[str, list[int]] = {}
        for pod in list(self.cluster.pods.values()):
            taken = pod.memory_bytes()
            for container in pod.containers:
                limit = container.spec.get("resources", {}).get("limits", {}).get("memory")
                if limit:
                    own = taken[container.name] >> 20
                    name = f"{pod.name.partition('-rehearse')[0]} {container.name}"
                    most = max(own, found.get(name, [0])[0])
                    found[name] = [most, int(quantity(limit)) >> 20]
        return found

    def status(self) -> dict[str, int]:
        """Replicas that take rows, by group, by `expertmesh status` in the client's Pod."""
        client = self.cluster.pods["client"].containers[0]
        command = ["expertmesh", "status", "--json", "--target", "router.expertmesh:50051"]
        said = client.run(command, 30.0)
        if said.returncode:
            return {}
        replicas = json.loads(said.stdout)["replicas"]
        groups = [own["group"] for own in replicas if own.get("state") == "READY"]
        return {group: groups.count(group) for group in sorted(set(groups))}


def start(rehearsal: Rehearsal) -> Callers:
    """Apply everything; it serves, and the client gets transformers' tokens."""
    rehearsal.apply()
    cluster, found = rehearsal.cluster, rehearsal.found
    callers = Callers(cluster)
    callers.start()
    head_s = rehearsal.until(
        "the head is ready", START_S, lambda: any(pod.ready for pod in cluster.of(ray="head"))
    )
    running_s = rehearsal.until("applications run", START_S, rehearsal.operator.running)
    ready_s = rehearsal.until("all Pods are ready", START_S, rehearsal.all_ready)
    callers.wait_ready()
    callers.change(*LIGHT)
    callers.more(8, "as transformers would answer")
    found["start"] = {"head_s": head_s, "running_s": running_s, "ready_s": ready_s}
    found["pods"] = {pod.name: pod.restarts for pod in cluster.pods.values()}
    return callers


def lose_head(rehearsal: Rehearsal, callers: Callers) -> None:
    """Serving goes on without a head; a new one remembers everything."""
    [head] = rehearsal.cluster.of(ray="head")
    puts, replicas = rehearsal.operator.num_puts, rehearsal.operator.lives()
    head.kill()
    rehearsal.say("the head is dead")
    callers.more(8, "without a head")
    rehearsal.operator.replace(head)
    rehearsal.until(
        "a new head is ready",
        RECOVER_S,
        lambda: any(pod.ready for pod in rehearsal.cluster.of(ray="head")),
    )
    rehearsal.until("applications run again", RECOVER_S, rehearsal.operator.running)
    rehearsal.until("all Pods are ready", RECOVER_S, rehearsal.all_ready)
    callers.more(8, "with the new head")
    rehearsal.found["head"] = {
        "puts": rehearsal.operator.num_puts - puts,
        "same_replicas": rehearsal.operator.lives() == replicas,
    }


def lose_worker(rehearsal: Rehearsal, callers: Callers) -> None:
    """The other replicas answer; a new Pod comes and takes work."""
    worker = rehearsal.cluster.of(ray="worker")[0]
    worker.kill()
    rehearsal.say(f"{worker.name} is dead")
    rehearsal.operator.replace(worker)
    callers.more(8, "with one worker")
    rehearsal.until("all Pods are ready", RECOVER_S, rehearsal.all_ready)
    rehearsal.until(
        "two replicas of each group take rows",
        RECOVER_S,
        lambda: rehearsal.operator.replicas() == {"g0": 2, "g1": 2},
    )
    callers.more(8, "with the new worker")


def change(rehearsal: Rehearsal, callers: Callers) -> None:
    """Another mesh.yaml: gateway, router and controllers are rolled, Serve takes the new rule."""
    cluster = rehearsal.cluster
    names = ("gateway", "router", "controller")
    old = [pod for name in names for pod in cluster.of(app=name)]
    replicas = rehearsal.operator.lives()
    changed = rehearsal.apply(mode="on")
    rehearsal.until(
        "Pods with the new configuration are ready, and the old ones gone",
        RECOVER_S,
        lambda: (
            all(pod.name in rehearsal.deployments.deleted_s for pod in old)
            and rehearsal.all_ready()
        ),
    )
    rehearsal.until("applications run", RECOVER_S, rehearsal.operator.running)
    callers.more(8, "with the new configuration")
    rehearsal.found["change"] = {
        "lines": changed,
        "same_replicas": rehearsal.operator.lives() == replicas,
        "gateway_s": [
            round(rehearsal.deployments.deleted_s[pod.name], 1)
            for pod in old
            if pod.name.startswith("gateway")
        ],
    }


def grow(rehearsal: Rehearsal, callers: Callers) -> None:
    """More calls: a group grows, Ray's autoscaler asks for a Pod, and gets it."""
    callers.change(*HEAVY)
    rehearsal.until(
        "Ray's autoscaler asks for a third worker", SCALE_S, lambda: rehearsal.workers() == 3
    )
    rehearsal.until("all Pods are ready", SCALE_S, rehearsal.all_ready)
    rehearsal.until(
        "a third replica runs", SCALE_S, lambda: 3 in rehearsal.operator.replicas().values()
    )
    callers.more(30, "with a third replica")
    rehearsal.found["grown"] = rehearsal.operator.replicas()


def shrink(rehearsal: Rehearsal, callers: Callers) -> None:
    """Hardly any calls: the replica goes, and then its Pod."""
    callers.change(*CALM)
    rehearsal.until(
        "two replicas of each group",
        SCALE_S,
        lambda: rehearsal.operator.replicas() == {"g0": 2, "g1": 2},
    )
    rehearsal.until(
        "Ray's autoscaler takes a worker back", SCALE_S, lambda: rehearsal.workers() == 2
    )
    rehearsal.until("its Pod is gone", SCALE_S, lambda: rehearsal.operator.deleted_s)
    callers.more(2, "with two workers")
    rehearsal.found["shrunk"] = {"deleted_s": list(rehearsal.operator.deleted_s.values())}


STEPS = (lose_head, lose_worker, change, grow, shrink)


def run(steps: tuple[Callable[[Rehearsal, Callers], None], ...]) -> dict[str, Any]:
    """The whole story, or as far as it came: then `failed` says why."""
    with running() as cluster:
        rehearsal = Rehearsal(cluster)
        try:
            callers = start(rehearsal)
            for step in steps:
                rehearsal.say(f"== {step.__name__}: {step.__doc__}")
                step(rehearsal, callers)
            rehearsal.found["memory"] = rehearsal.memory()
            calls = callers.end()
            rehearsal.found["calls"] = vars(calls)
            rehearsal.say(f"{calls}")
        except (DidNotComeError, AssertionError, OSError):
            rehearsal.found["failed"] = traceback.format_exc()
            with cluster.lock:
                rehearsal.found["logs"] = "\n".join(pod.story() for pod in cluster.pods.values())
    return rehearsal.found


def _keep_logs(folder: Path) -> None:
    """Of containers, and of Ray in them."""
    shutil.copytree(STATE / "logs", folder, dirs_exist_ok=True)
    for session in STATE.glob("pods/*/**/session_*/logs"):
        if not session.parent.is_symlink():
            place = folder / "ray" / session.relative_to(STATE / "pods").parts[0]
            shutil.copytree(
                session,
                place,
                dirs_exist_ok=True,
                ignore_dangling_symlinks=True,
                ignore=shutil.ignore_patterns("*.sock"),
            )


def main(logs: str, *names: str) -> None:
    """Args: where logs of containers are left, and which steps; all by default."""
    steps = tuple(step for step in STEPS if not names or step.__name__ in names)
    found = run(steps if names != ("start",) else ())
    _keep_logs(Path(logs))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
