"""A container: a root of its own over this machine's files, and processes of its own."""

import os
import shlex
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.rehearsal.images import Image, traversed
from tests.e2e.rehearsal.outside import ROOT, STATE

_PARENT_PATH = os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")


@dataclass(frozen=True)
class Setting:
    """What a container gets from its Pod."""

    namespace: str
    """Of the network."""
    hostname: str
    folder: Path
    """Of the Pod, with etc/ of all its containers."""
    mounts: dict[str, tuple[Path, bool]]
    """Path in the container -> path here, whether it is read-only."""
    security: dict[str, Any]
    """Of the Pod."""


class Container:
    """Runs from `start` until it ends, is stopped or killed."""

    def __init__(self, spec: dict[str, Any], image: Image, env: dict[str, str], setting: Setting):
        self.name: str = spec["name"]
        self.spec = spec
        self._setting = setting
        self._image = image
        self._env = image.env | env
        self._folder = setting.folder / self.name
        self.log = STATE / "logs" / f"{setting.hostname}.{self.name}.log"
        self._lock = threading.Lock()

    def start(self) -> None:
        """Does not wait."""
        for name in ("upper", "work", "root"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(exist_ok=True)
        command = ["ip", "netns", "exec", self._setting.namespace, "unshare", "--mount", "--pid"]
        command += ["--uts", "--fork", "--kill-child", "sh", "-ec", self._script()]
        log = self.log.open("ab")
        self._process = subprocess.Popen(
            command, env={"PATH": _PARENT_PATH}, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        log.close()

    def code(self) -> int | None:
        """None while it runs."""
        with self._lock:
            return self._process.poll()

    def wait(self, timeout_s: float) -> int:
        """The exit code.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        return self._process.wait(timeout_s)

    def first_pid(self) -> int:
        """Of its first process, as seen from here; 0 if there is none (any more)."""
        try:
            path = f"/proc/{self._process.pid}/task/{self._process.pid}/children"
            return int(Path(path).read_text().split()[0])
        except (OSError, IndexError):
            return 0

    def entered(self) -> bool:
        """Whether its first process has its own root by now: before, `inside` would be here."""
        try:
            return os.readlink(f"/proc/{self.first_pid()}/root") != "/"
        except OSError:
            return False

    def send(self, number: signal.Signals) -> None:
        """A signal to its first process."""
        if pid := self.first_pid():
            os.kill(pid, number)

    def inside(self, argv: list[str]) -> list[str]:
        """A command that runs `argv` in it, as `kubectl exec` does."""
        enter = ["nsenter", "-t", str(self.first_pid()), "-n", "-m", "-p", "-u", "--root", "--wd"]
        pairs = [f"{name}={value}" for name, value in self._env.items()]
        return [*enter, "--", *self._as_user(), "env", "-i", *pairs, *argv]

    def run(self, argv: list[str], timeout_s: float) -> "subprocess.CompletedProcess[str]":
        """Run `argv` in it to its end."""
        return subprocess.run(
            self.inside(argv), capture_output=True, text=True, timeout=timeout_s,
            env={"PATH": _PARENT_PATH}, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def tail(self, num_chars: int = 3000) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-num_chars:] if self.log.exists() else ""

    def _argv(self) -> list[str]:
        spec = self.spec
        if "command" in spec:
            words = [*spec["command"], *spec.get("args", [])]
        else:
            words = [*self._image.entry_point, *spec.get("args", [])]
        return [_expanded(word, self._env) for word in words]

    def _context(self) -> dict[str, Any]:
        own: dict[str, Any] = self.spec.get("securityContext", {})
        return self._setting.security | own

    def _as_user(self) -> list[str]:
        context = self._context()
        user, group = context["runAsUser"], context["runAsGroup"]
        own = ["setpriv", f"--reuid={user}", f"--regid={group}", "--no-new-privs"]
        extra = context.get("fsGroup", group)
        assert context["capabilities"] == {"drop": ["ALL"]}
        return [*own, f"--groups={extra}", "--bounding-set=-all", "--inh-caps=-all"]

    def _script(self) -> str:
        """Its root, then its command."""
        root, folder = self._folder / "root", self._folder
        lines = [
            "mount --make-rprivate /",
            f"hostname {self._setting.hostname} 2>/dev/null || "
            f"printf {self._setting.hostname} > /proc/sys/kernel/hostname",
            f"mount -t overlay overlay -o lowerdir=/,upperdir={folder}/upper,workdir={folder}/work "
            f"{root}",
            f"mkdir -p {root}{self._image.home}",
            *(f"chmod o+x {root}{path} 2>/dev/null || :" for path in traversed()),
            f"mount --rbind /dev {root}/dev",
            f"mount -t tmpfs -o mode=1777 tmpfs {root}/dev/shm",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /sys {root}/sys",
            f"mkdir -p -m 1777 {folder}/tmp && mount --bind {folder}/tmp {root}/tmp",
        ]
        if self._image.home != "/":
            user = self._context()["runAsUser"]
            lines.append(f"mkdir -p {root}{self._image.home}")
            if self._image.home != "/tmp":
                lines.append(f"chown {user} {root}{self._image.home}")
        lines += [f"ln -sfn {here} {root}{path}" for path, here in self._made_links(root, lines)]
        etc = self._setting.folder / "etc"
        lines += [
            _bound(etc / name, f"{root}/etc/{name}", True) for name in ("hosts", "resolv.conf")
        ]
        for at, (here, read_only) in self._setting.mounts.items():
            # links like /var/run are absolute: they would lead out of the root
            lines.append(_bound(here, f"{root}{Path(at).resolve()}", read_only))
        # last, as it may lie below one of them
        lines.append(f"mkdir -p {root}{ROOT} && mount --bind {STATE}/repository {root}{ROOT}")
        if self._context().get("readOnlyRootFilesystem"):
            lines.append(f"mount -o remount,bind,ro {root}")
        pairs = [f"{name}={value}" for name, value in self._env.items()]
        argv = ["chroot", str(root), *self._as_user(), "env", "-i", *pairs, *self._argv()]
        lines.append(f"cd / && exec {shlex.join(argv)}")
        return "\n".join(lines)

    def _made_links(self, root: Path, lines: list[str]) -> list[tuple[str, str]]:
        for path in self._image.links:
            lines.append(f"mkdir -p {root}{Path(path).parent}")
        return list(self._image.links.items())


def _bound(here: Path, there: str, read_only: bool) -> str:
    make = f"mkdir -p {there}" if here.is_dir() else f"rm -f {there} && touch {there}"
    bound = f"{make} && mount --bind {here} {there}"
    return f"{bound} && mount -o remount,bind,ro {there}" if read_only else bound


def _expanded(word: str, env: dict[str, str]) -> str:
    for name, value in env.items():
        word = word.replace(f"$({name})", value)
    return word
