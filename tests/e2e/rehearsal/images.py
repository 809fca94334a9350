"""The two images as the Dockerfile describes them: variables, entry point, and who runs in them.

Their files are this machine's, below a layer of the container's own; what `COPY` and `RUN` would
put elsewhere is linked to where it lies here.
"""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.rehearsal.outside import ROOT

from expertmesh.runtime.redis_server import find_server

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_STAGES = {"expertmesh": "gateway", "expertmesh-experts": "experts"}


@dataclass(frozen=True)
class Image:
    """What a container has before Kubernetes says anything."""

    env: dict[str, str]
    entry_point: tuple[str, ...]
    links: dict[str, str]
    """Path in the container -> path here."""
    home: str = "/"


def image_of(name: str) -> Image:
    """By the name in a manifest, with or without registry and tag."""
    short = name.rpartition("/")[2].partition(":")[0]
    if short == "redis":
        return Image({"PATH": _PATH}, (), {"/usr/local/bin/redis-server": str(find_server().path)})
    return _ours(_STAGES[short])


def _ours(stage: str) -> Image:
    text = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    lines = re.split(rf"^FROM .* AS {stage}$", text, flags=re.M)[1].split("\nFROM ")[0].splitlines()
    env = {"PATH": _PATH, "PYTHONWARNINGS": "ignore"}
    entry: tuple[str, ...] = ()
    for line in lines:
        if line.startswith("ENV "):
            pairs = (word.partition("=") for word in shlex.split(line.removeprefix("ENV ")))
            env |= {key: value.replace("$PATH", env["PATH"]) for key, _, value in pairs}
        if line.startswith("ENTRYPOINT "):
            entry = tuple(eval_list(line.removeprefix("ENTRYPOINT ")))
    links = {"/opt/venv": sys.prefix, "/opt/expertmesh/demo-moe": f"{ROOT}/examples/demo-moe"}
    home = "/home/mesh" if stage == "experts" else "/tmp"
    return Image({"HOME": home} | env, entry, links, home)


def eval_list(text: str) -> list[str]:
    """'["a", "b"]' -> its words."""
    return re.findall(r'"([^"]*)"', text)


def traversed() -> list[Path]:
    """Folders that users other than root must be able to pass through to our files."""
    places = {ROOT, Path(sys.prefix), Path(sys.base_prefix), find_server().path.parent}
    return sorted({parent for place in places for parent in place.resolve().parents} - {Path("/")})
