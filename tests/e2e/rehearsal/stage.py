"""The rehearsed cluster with its controllers, and how a drill waits, applies and looks."""

import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from tests.e2e.rehearsal import overlay
from tests.e2e.rehearsal.cluster import Cluster
from tests.e2e.rehearsal.controllers import Deployments
from tests.e2e.rehearsal.operator import Operator
from tests.e2e.rehearsal.outside import STATE
from tests.e2e.rehearsal.pods import Pod
from tests.e2e.rehearsal.raypods import quantity
from tests.e2e.rehearsal.waiting import until


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
        """Replicas that the router hears, by group; `expertmesh status` in the client's Pod."""
        client = self.cluster.pods["client"].containers[0]
        command = ["expertmesh", "status", "--json", "--target", "router.expertmesh:50051"]
        said = client.run(command, 30.0)
        if said.returncode:
            return {}
        answer = json.loads(said.stdout)
        groups = [own["state"]["group"] for own in answer.get("replicas", [])]
        here = answer.get("redisConnected", answer.get("redis_connected", False))
        return {group: groups.count(group) for group in sorted(set(groups))} if here else {}
