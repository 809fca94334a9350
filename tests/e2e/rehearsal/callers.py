"""The client's Pod as the story sees it."""

import json
import subprocess
import threading
from dataclasses import dataclass, field

from tests.e2e.rehearsal.cluster import NAMESPACE, Cluster
from tests.e2e.rehearsal.outside import ROOT
from tests.e2e.rehearsal.waiting import until

_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
MODEL_DIR = "/opt/expertmesh/demo-moe"


def pod() -> dict[str, object]:
    """Its manifest: an image of ours and a label that the network policy lets through."""
    container = {
        "name": "client",
        "image": "expertmesh:0.1.0",
        "command": ["sleep", "infinity"],
        "securityContext": _SECURITY,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "client",
            "namespace": NAMESPACE,
            "labels": {"expertmesh/client": "true"},
        },
        "spec": {
            "containers": [container],
            "securityContext": {"runAsUser": 10001, "runAsGroup": 10001},
        },
    }


@dataclass
class Calls:
    """Those that have ended."""

    done: int = 0
    different: int = 0
    errors: list[str] = field(default_factory=list)
    longest_s: float = 0.0


class Callers:
    """Steady load from the client's Pod; every call is compared with transformers there."""

    def __init__(self, cluster: Cluster) -> None:
        self.calls = Calls()
        self._ready = False
        self._pod = cluster.start(pod())

    def start(self) -> None:
        """Begin; the client computes what it expects meanwhile."""
        until("the client's Pod", 30.0, lambda: self._pod.ready, self._pod.story)
        script = ["python", "-m", "tests.e2e.rehearsal.client", MODEL_DIR]
        shell = f"cd {ROOT} && exec " + " ".join(script)
        self._process = subprocess.Popen(
            self._pod.containers[0].inside(["sh", "-c", shell]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._pod.containers[0].log.open("ab"),
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def wait_ready(self) -> None:
        """transformers has answered."""
        until("the client's transformers", 120.0, lambda: self._ready, self._pod.story)

    def change(self, num: int, pause_s: float) -> None:
        """Other callers."""
        assert self._process.stdin
        self._process.stdin.write(f"{num} {pause_s}\n")
        self._process.stdin.flush()

    def more(self, num: int, what: str) -> None:
        """Wait for so many more calls."""
        goal = self.calls.done + num
        until(f"{num} calls {what}", 90.0, lambda: self.calls.done >= goal, lambda: self.calls)

    def end(self) -> Calls:
        """No more callers; what there was."""
        assert self._process.stdin
        self._process.stdin.write("end\n")
        self._process.stdin.flush()
        self._process.wait(90.0)
        return self.calls

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.strip() == "ready":
                self._ready = True
                continue
            call = json.loads(line)
            self.calls.done += 1
            self.calls.different += not call["error"] and not call["same"]
            self.calls.longest_s = max(self.calls.longest_s, call["took_s"])
            if call["error"]:
                self.calls.errors.append(f"{call['error']} after {call['took_s']} s: {call['got']}")
