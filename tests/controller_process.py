"""A controller in a process of its own that kills or stops itself at a given point.

`python controller_process.py REDIS_URL MESH SETTINGS_JSON [POINT [SIGNAL]]`
"""

import asyncio
import os
import signal
import sys

from expertmesh.services.controller.process import controlling
from expertmesh.services.settings import ControllerSettings


async def main(
    redis_url: str, mesh: str, settings: str, fatal: str = "", name: str = "SIGKILL"
) -> None:
    def at(point: str) -> None:
        sys.stdout.write(f"{point}\n")
        sys.stdout.flush()
        if point == fatal:
            os.kill(os.getpid(), signal.Signals[name])

    own = ControllerSettings.model_validate_json(settings)
    async with controlling(own, redis_url, mesh, at):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
