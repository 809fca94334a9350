"""A gateway in a process of its own, without Ray: `python -m benchmarks.harness.gateway`."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.harness.mesh import MODEL
from expertmesh.runtime.channels import DEFAULT_MAX_MESSAGE_BYTES
from expertmesh.runtime.child import dying_with_parent
from expertmesh.services.gateway.args import GatewayArgs
from expertmesh.services.gateway.gateway import Gateway
from expertmesh.services.health import wait_serving

_READY_S = 120.0


async def _main(args: GatewayArgs) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    gateway = await Gateway.start(args)
    await wait_serving(gateway.address, _READY_S)
    print(gateway.address, flush=True)
    await stop.wait()
    await gateway.stop()


def start_gateway(
    model_dir: Path, redis_url: str, **changes: Any
) -> tuple["subprocess.Popen[str]", Callable[[], str]]:
    """A gateway process, and what waits until it serves and says its address.

    Args:
        changes: of `GatewayArgs`, where they differ from what `expertmesh serve` takes.
    """
    fields: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "model_dir": str(model_dir),
        "model": MODEL,
        "redis_url": redis_url,
        "mesh": "default",
        "dtype": "auto",
        "deterministic": False,
        "max_message_bytes": DEFAULT_MAX_MESSAGE_BYTES,
        "otlp_endpoint": None,
        "log_level": "WARNING",
    }
    module = [sys.executable, "-m", "benchmarks.harness.gateway", json.dumps(fields | changes)]
    process = subprocess.Popen(dying_with_parent(module), stdout=subprocess.PIPE, text=True)

    def wait() -> str:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "the gateway did not start"
        return address

    return process, wait


@contextmanager
def gateway_process(model_dir: Path, redis_url: str, **changes: Any) -> Iterator[tuple[int, str]]:
    """(pid, address) of a gateway that serves.

    Args:
        changes: see `start_gateway`.
    """
    process, wait = start_gateway(model_dir, redis_url, **changes)
    try:
        yield process.pid, wait()
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    uvloop.run(_main(GatewayArgs(**json.loads(sys.argv[1]))))
