"""A Serve application that does nothing, and a process that starts Ray with some of them.

`python -m benchmarks.noop_serve COUNT` prints "running" when all run, then stops.
"""

import asyncio
import sys
from typing import Any

from pydantic import BaseModel
from ray import serve

_TIMEOUT_S = 120.0


class Nothing:
    """Answers nothing."""


class NoArgs(BaseModel):
    """None."""


def build(args: NoArgs) -> serve.Application:
    """One deployment of one replica."""
    deployment: Any = serve.deployment(ray_actor_options={"num_cpus": 0})(Nothing)
    application: serve.Application = deployment.bind()
    return application


def main(count: int) -> None:
    """Start Ray, deploy through Serve's config path, wait until all run."""
    from expertmesh.services.ray_cluster import deploy, ray_cluster, wait_running

    names = [f"nothing-{number}" for number in range(count)]
    applications = [
        {"name": name, "import_path": "benchmarks.noop_serve:build", "route_prefix": None}
        for name in names
    ]
    with ray_cluster():
        deploy({"proxy_location": "Disabled", "applications": applications})
        asyncio.run(wait_running(names, _TIMEOUT_S, lambda text: None))
        print("running", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
