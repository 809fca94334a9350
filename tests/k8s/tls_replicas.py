"""Replicas of all groups of a serveConfigV2, without Ray.

`python -m tests.k8s.tls_replicas FILE TAG HOST`
"""

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.experts.replica import Replica
from expertmesh.runtime.config import validate


async def main(applications: list[dict[str, Any]], tag: str, host: str) -> None:
    """Until SIGTERM; `host` is what Ray would say is the node's."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    groups = [
        validate(ExpertGroupArgs, app["args"] | {"host": host, "local_socket": False})
        for app in applications
    ]
    running = [await Replica.start(args, f"{args.group}#{tag}") for args in groups]
    print("replicas serve", flush=True)  # noqa: T201
    await stopping.wait()
    await asyncio.gather(*(replica.drain_and_stop() for replica in running))


if __name__ == "__main__":
    config = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    asyncio.run(main(config["applications"], *sys.argv[2:4]))
