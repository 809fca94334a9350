"""An OpenTelemetry collector that takes everything and keeps nothing, in a process of its own."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from expertmesh.runtime.child import dying_with_parent

_SERVICES = (
    "opentelemetry.proto.collector.trace.v1.TraceService",
    "opentelemetry.proto.collector.metrics.v1.MetricsService",
)


async def _accept(request: bytes, context: Any) -> bytes:
    return b""  # an empty Export...Response


async def _serve() -> None:
    server = grpc.aio.server()
    for service in _SERVICES:
        handler: Any = grpc.unary_unary_rpc_method_handler(_accept)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {"Export": handler}),)
        )
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


@contextmanager
def collector_process() -> Iterator[tuple[int, str]]:
    """(pid, endpoint) of a running collector."""
    command = dying_with_parent([sys.executable, "-m", "benchmarks.harness.collector"])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.pid, f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    asyncio.run(_serve())
