"""Ray and Ray Serve on this machine, and the mesh's applications on it.

Applications are deployed through Serve's declarative config path, the one `serve deploy` and a
RayService use: `serve.run` would restart every replica on any change.
"""

import asyncio
import logging
import os
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from expertmesh.runtime.errors import ExpertMeshError, Unavailable
from expertmesh.runtime.imports import collector_paused

Progress = Callable[[str], None]

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # it kills replicas when other processes fill the host
    "RAY_DEDUP_LOGS": "1",
}
_LOGICAL_CPUS = 64  # replicas reserve none by default; Ray's own actors need some
_OBJECT_STORE_BYTES = 80 << 20  # nothing of ours goes through it
_POLL_S = 0.1
_RUNNING_POLL_S = 0.3  # asking takes 30 ms of the CPU that replicas need to start
_STOP_TIMEOUT_S = 40.0  # longer than a replica may drain


class DeployFailed(ExpertMeshError):
    """Serve gave up on an application; the message is the replica's own."""


@contextmanager
def ray_cluster(host: str = "127.0.0.1") -> Iterator[None]:
    """A Ray cluster of one node with Serve running, for the length of the block."""
    os.environ.update({**_QUIET, **os.environ})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with collector_paused():
            import ray
            from ray import serve

        ray.init(
            address="local",
            num_cpus=_LOGICAL_CPUS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
            _node_ip_address=host,
        )
        try:
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            serve.start(proxy_location="Disabled")
            yield
        finally:
            _delete_applications()
            ray.shutdown()


def _delete_applications() -> None:
    """Drain and stop all replicas. `serve.shutdown` would too, but prints an error of its own."""
    deploy({"applications": []})
    _wait_gone(lambda applications: not applications)


async def remove_application(config: Mapping[str, Any], name: str, drain_s: float) -> None:
    """Deploy `config` without one application and wait until that has drained and gone.

    Args:
        drain_s: how long its running calls may take.
    """
    others = [app for app in config["applications"] if app["name"] != name]
    deploy({**config, "applications": others})
    gone = lambda applications: name not in applications  # noqa: E731
    await asyncio.to_thread(_wait_gone, gone, _STOP_TIMEOUT_S + drain_s)


def _wait_gone(
    gone: Callable[[Mapping[str, Any]], bool], timeout_s: float = _STOP_TIMEOUT_S
) -> None:
    from ray import serve

    deadline_s = time.monotonic() + timeout_s
    while not gone(serve.status().applications) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def deploy(config: Mapping[str, Any]) -> None:
    """Ask Serve to run exactly the applications of `config`; returns at once."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = _get_global_client()
        assert client, "Serve is not running"
        client.deploy_apps(ServeDeploySchema.model_validate(dict(config)))


def only(config: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The config with some of its applications, in that order."""
    applications = {app["name"]: app for app in config["applications"]}
    return {**config, "applications": [applications[name] for name in names]}


async def wait_built(name: str, timeout_s: float) -> None:
    """Until Serve starts the application's replicas, or has given up on it."""
    from ray import serve

    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        status = (await asyncio.to_thread(serve.status)).applications.get(name)
        if status and (status.deployments or status.status == "DEPLOY_FAILED"):
            return
        await asyncio.sleep(_POLL_S)


async def wait_running(names: list[str], timeout_s: float, progress: Progress) -> None:
    """Until every named application is RUNNING. Raises as `as_running` does."""
    num_running = 0
    async for name in as_running(names, timeout_s):
        num_running += 1
        progress(f"{name} is running ({num_running} of {len(names)})")


async def as_running(
    names: list[str], timeout_s: float, served: "asyncio.Task[None] | None" = None
) -> AsyncIterator[str]:
    """Each of the named applications as it is found RUNNING, until all are.

    Args:
        served: when it is done, all of them are known to run, before Serve says so.

    Raises:
        DeployFailed: one of them cannot start; says why.
        Unavailable: not all are running after `timeout_s`.
    """
    from ray import serve

    running: set[str] = set()
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        applications = (await asyncio.to_thread(serve.status)).applications
        for name in names:
            status = applications.get(name)
            if status is None or name in running:
                continue
            if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise DeployFailed(f"{name}: {_cause(status)}", application=name)
            if status.status == "RUNNING":
                running.add(name)
                yield name
        if len(running) == len(names):
            return
        if served is None:
            await asyncio.sleep(_RUNNING_POLL_S)
        elif (await asyncio.wait([served], timeout=_RUNNING_POLL_S))[0]:
            served.result()
            for name in names:
                if name not in running:
                    yield name
            return
    missing = ", ".join(sorted(set(names) - running))
    raise Unavailable(f"not running after {timeout_s:.0f} s: {missing}; see Ray's logs")


def _cause(status: Any) -> str:
    """The last line of the replica's traceback that names one of our errors, else the message."""
    texts = [status.message, *(d.message for d in status.deployments.values())]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    ours = [line for line in lines if line.startswith("expertmesh.")]
    return ours[-1] if ours else next((line for line in lines if line), "no reason given")
