"""Namespaces around everything, and why there may be none here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
STATE = Path("/run/rehearsal")
"""Of the rehearsal, in memory; /run is its own."""
_NEEDED = ("ip", "unshare", "nsenter", "setpriv", "mount", "chroot", "wget", "bash")
UNSHARE = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_TRIAL = """
mount --make-rprivate / && mount -t tmpfs tmpfs /run && mkdir -p /run/netns /run/u /run/w /run/m &&
mount -t overlay overlay -o lowerdir=/,upperdir=/run/u,workdir=/run/w /run/m &&
ip link add trial type bridge && ip netns add trial
"""


def missing() -> str:
    """What keeps the rehearsal from running on this machine; empty if nothing does."""
    if os.geteuid() != 0:
        return "the rehearsal makes network namespaces and mounts: it needs root"
    absent = [name for name in _NEEDED if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (iproute2, util-linux, wget, bash)"
    done = subprocess.run([*UNSHARE, "sh", "-ec", _TRIAL], capture_output=True, text=True)
    return "" if not done.returncode else f"no namespaces or overlays: {done.stderr.strip()[-300:]}"


def command(*args: str) -> list[str]:
    """The rehearsal, in namespaces of its own."""
    setup = "mount --make-rprivate / && mount -t tmpfs tmpfs /run && mkdir -p /run/netns && exec "
    own = (sys.executable, "-W", "ignore", "-m", "tests.e2e.rehearsal.story")
    # with whoever started it, too
    dying = ("setpriv", "--pdeathsig", "KILL")
    return [*dying, *UNSHARE, "sh", "-ec", f'{setup}"$@"', "sh", *own, *args]
