"""A Pod and its kubelet: volumes, network, init containers, probes, and how it ends."""

import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from tests.e2e.rehearsal import network, probes, volumes
from tests.e2e.rehearsal.containers import Container, Setting
from tests.e2e.rehearsal.images import image_of
from tests.e2e.rehearsal.outside import STATE
from tests.e2e.rehearsal.volumes import Get, Manifest

_INIT_S = 180.0
_PERIOD_S = 10.0  # Kubernetes' defaults
_FAILURES = 3


class Pod:
    """Started by `start`, in a thread of its own; `problem` says why it is not ready for ever."""

    def __init__(self, manifest: Manifest, get: Get) -> None:
        self.manifest = manifest
        self.name: str = manifest["metadata"]["name"]
        self.labels: dict[str, str] = manifest["metadata"]["labels"]
        self.spec: dict[str, Any] = manifest["spec"]
        self.ready = False
        self.going = False
        self.problem = ""
        self.failed = False
        """A container ended that is not to be started again."""
        self.restarts: list[str] = []
        self.containers: list[Container] = []
        self._get = get
        self._namespace, self.address = network.add_namespace()
        network.write_etc(
            self._namespace, self.address, self.name, manifest["metadata"]["namespace"]
        )

    def start(self) -> None:
        """Returns at once."""
        threading.Thread(target=self._live, name=self.name, daemon=True).start()

    def _live(self) -> None:
        try:
            folders = volumes.made(self._namespace, self.spec, self._get)
            for spec in self.spec.get("initContainers", []):
                if not self._ran_first(self._container(spec, folders)):
                    return
            started = [self._container(spec, folders) for spec in self.spec["containers"]]
        except (volumes.NotThereError, subprocess.TimeoutExpired) as error:
            self.problem = str(error)
            return
        for container in started:
            container.start()
        self.containers = started
        self._watch([_Watched(container, self.address) for container in started])

    def _watch(self, watches: "list[_Watched]") -> None:
        never = self.spec.get("restartPolicy") == "Never"
        while not self.going and not self.failed:
            now_s = time.monotonic()
            states = [watch.look(now_s) for watch in watches]
            self.ready = all(states) and not self.going
            for watch in watches:
                if watch.ended and not self.going:
                    self.restarts.append(watch.ended)
                    self.failed = never
                    if not never:
                        watch.again()
            time.sleep(0.1)
        self.ready = False

    def _ran_first(self, container: Container) -> bool:
        container.start()
        self.containers = [container]
        code = container.wait(_INIT_S)
        if code:
            self.problem = f"init container {container.name} ended with {code}"
        return not code and not self.going

    def _container(self, spec: dict[str, Any], folders: dict[str, Path]) -> Container:
        mounts = {
            own["mountPath"]: (folders[own["name"]], own.get("readOnly", False))
            for own in spec.get("volumeMounts", [])
        }
        setting = Setting(
            self._namespace,
            self.name,
            STATE / "pods" / self._namespace,
            mounts,
            self.spec["securityContext"],
        )
        env = volumes.environment(spec, self.manifest, self._get)
        return Container(spec, image_of(spec["image"]), env, setting)

    def kill(self) -> None:
        """No process of it says goodbye; then its address is gone."""
        self.going, self.ready = True, False
        for container in self.containers:
            container.send(signal.SIGKILL)
            container.wait(10.0)
        network.delete_namespace(self._namespace)

    def delete(self) -> float:
        """As `kubectl delete pod`: preStop, SIGTERM, SIGKILL after the grace period; seconds."""
        self.going, self.ready = True, False
        began_s = time.monotonic()
        deadline_s = began_s + self.spec.get("terminationGracePeriodSeconds", 30)
        threads = [
            threading.Thread(target=_stop, args=(container, deadline_s))
            for container in self.containers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        network.delete_namespace(self._namespace)
        return time.monotonic() - began_s

    def memory_bytes(self) -> dict[str, int]:
        """Of each container, its share of shared pages included."""
        return {container.name: _memory_bytes(container) for container in self.containers}

    def refresh(self) -> None:
        """Write ConfigMaps and Secrets again, as a kubelet does after a change."""
        volumes.made(self._namespace, self.spec, self._get)

    def story(self) -> str:
        """For messages."""
        tails = "\n".join(f"--- {own.log.name}\n{own.tail()}" for own in self.containers)
        return f"{self.name}: ready={self.ready} {self.problem} restarts={self.restarts}\n{tails}"


def _stop(container: Container, deadline_s: float) -> None:
    hook = container.spec.get("lifecycle", {}).get("preStop", {})
    if "sleep" in hook:
        time.sleep(hook["sleep"]["seconds"])
    if "exec" in hook:
        _note(container, _hook_said(container, hook["exec"]["command"], deadline_s))
    container.send(signal.SIGTERM)
    try:
        container.wait(max(0.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        _note(container, "killed at the end of its grace period")
        container.send(signal.SIGKILL)
        container.wait(10.0)


def _hook_said(container: Container, command: list[str], deadline_s: float) -> str:
    try:
        done = container.run(command, deadline_s - time.monotonic())
    except subprocess.TimeoutExpired:
        return "preStop did not end within the grace period"
    return f"preStop ended with {done.returncode}: {done.stdout.strip()}{done.stderr[-500:]}"


def _note(container: Container, text: str) -> None:
    with container.log.open("a") as log:
        log.write(f"{text}\n")


def _memory_bytes(container: Container) -> int:
    try:
        inside = Path(f"/proc/{container.first_pid()}/ns/pid").readlink()
    except OSError:
        return 0
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "ns/pid").readlink() == inside:
                lines = (process / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return total << 10


class _Watched:
    """One container's probes: whether it is ready, and when it has to be started again."""

    def __init__(self, container: Container, address: str) -> None:
        self._container = container
        self._address = address
        self._begin()

    def _begin(self) -> None:
        self.ended = ""
        self._began_s = time.monotonic()
        self._next_s: dict[str, float] = {}
        self._failed = {"startupProbe": 0, "livenessProbe": 0, "readinessProbe": 0}
        self._started = "startupProbe" not in self._container.spec
        self._ready = "readinessProbe" not in self._container.spec

    def look(self, now_s: float) -> bool:
        """Ask what is due; whether it is ready."""
        code = self._container.code()
        if code is not None:
            self.ended = f"{self._container.name} ended with {code}"
            return False
        if not self._container.entered():
            return False
        if not self._started:
            self._ask("startupProbe", now_s)
        else:
            self._ask("livenessProbe", now_s)
            self._ask("readinessProbe", now_s)
        return self._started and self._ready

    def _ask(self, kind: str, now_s: float) -> None:
        probe = self._container.spec.get(kind)
        first_s = self._began_s + (probe or {}).get("initialDelaySeconds", 0)
        if probe is None or now_s < self._next_s.get(kind, first_s):
            return
        passed = probes.passes(probe, self._address, self._container)
        self._next_s[kind] = now_s + probe.get("periodSeconds", _PERIOD_S)
        self._failed[kind] = 0 if passed else self._failed[kind] + 1
        lost = self._failed[kind] >= probe.get("failureThreshold", _FAILURES)
        if kind == "readinessProbe":
            self._ready = passed or (self._ready and not lost)
        elif passed:
            self._started = True
        elif lost:
            self.ended = f"{self._container.name} failed its {kind}"

    def again(self) -> None:
        """Start it again."""
        self._container.send(signal.SIGKILL)
        self._container.wait(10.0)
        time.sleep(1.0)  # the first step of the kubelet's growing pause
        self._container.start()
        self._begin()
