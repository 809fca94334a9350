"""What happens in the rehearsal, in order. Run in namespaces of its own (`outside.command`).

Prints what was found as one line of JSON; progress goes to stderr.
"""

import json
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.rehearsal.callers import Callers
from tests.e2e.rehearsal.cluster import running
from tests.e2e.rehearsal.drills import STEPS, start
from tests.e2e.rehearsal.outside import STATE
from tests.e2e.rehearsal.stage import Rehearsal
from tests.e2e.rehearsal.waiting import DidNotComeError


def run(steps: tuple[Callable[[Rehearsal, Callers], None], ...]) -> dict[str, Any]:
    """The whole story, or as far as it came: then `failed` says why."""
    with running() as cluster:
        rehearsal = Rehearsal(cluster)
        callers = Callers(cluster)
        try:
            start(rehearsal, callers)
            for step in steps:
                rehearsal.say(f"== {step.__name__}: {step.__doc__}")
                step(rehearsal, callers)
            rehearsal.found["memory"] = rehearsal.memory()
            callers.end()
        except (DidNotComeError, AssertionError, OSError):
            rehearsal.found["failed"] = traceback.format_exc()
            with cluster.lock:
                rehearsal.found["logs"] = "\n".join(pod.story() for pod in cluster.pods.values())
        rehearsal.found["calls"] = vars(callers.calls)
        rehearsal.say(f"{callers.calls}")
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
