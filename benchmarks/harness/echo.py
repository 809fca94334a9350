"""The floor of the transport: replicas that send bytes back, over gRPC streams like ours.

`python -m benchmarks.harness.echo` serves; `EchoFanOut` calls several at once.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import uvloop

from benchmarks.harness.processes import cpu_seconds, with_descendants
from benchmarks.harness.turns import Turn
from expertmesh.runtime.channels import connect, server_options
from expertmesh.runtime.child import dying_with_parent

_SERVICE, _METHOD = "bench.Echo", "Stream"
_WARM_UP_CALLS = 20


async def _echo(requests: Any, context: Any) -> None:
    while (data := await context.read()) is not grpc.aio.EOF:
        await context.write(data)


async def _serve() -> None:
    server = grpc.aio.server(options=server_options())
    handler: Any = grpc.stream_stream_rpc_method_handler(_echo)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


@contextmanager
def echo_servers(count: int) -> Iterator[list[tuple[int, str]]]:
    """(pid, address) of `count` echo processes."""
    command = dying_with_parent([sys.executable, "-m", "benchmarks.harness.echo"])
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    try:
        yield [(p.pid, f"127.0.0.1:{int(p.stdout.readline())}") for p in processes if p.stdout]
    finally:
        for process in processes:
            process.terminate()
            process.wait()


class EchoFanOut:
    """A contestant: one message to each server at once, then all answers; all inside one loop.

    Args:
        payloads: a message for each server.
        tokens: that a call counts as.
    """

    def __init__(
        self,
        name: str,
        loop: asyncio.AbstractEventLoop,
        servers: Sequence[tuple[int, str]],
        payloads: Sequence[bytes],
        tokens: float,
    ) -> None:
        self.name = name
        self._loop = loop
        self._servers = servers
        self._payloads = payloads
        self._tokens = tokens
        self._calls: list[Any] = []
        self._channels: list[Any] = []

    def turn(self, seconds: float) -> Turn:
        """See `Contestant.turn`."""
        return asyncio.run_coroutine_threadsafe(self._turn(seconds), self._loop).result()

    async def _turn(self, seconds: float) -> Turn:
        if not self._calls:
            self._channels = [connect(address) for _, address in self._servers]
            method = f"/{_SERVICE}/{_METHOD}"
            self._calls = [channel.stream_stream(method)() for channel in self._channels]
        for _ in range(_WARM_UP_CALLS):
            await self._once()
        pids = with_descendants(pid for pid, _ in self._servers)
        latencies_s: list[float] = []
        cpu_s = cpu_seconds(pids) + time.process_time()
        started_s = now_s = time.perf_counter()
        while now_s < started_s + seconds:
            await self._once()
            done_s = time.perf_counter()
            latencies_s.append(done_s - now_s)
            now_s = done_s
        cpu_s = cpu_seconds(pids) + time.process_time() - cpu_s
        return Turn(latencies_s, self._tokens, now_s - started_s, cpu_s)

    async def _once(self) -> None:
        pairs = zip(self._calls, self._payloads, strict=True)
        await asyncio.gather(*(self._exchange(call, payload) for call, payload in pairs))

    @staticmethod
    async def _exchange(call: Any, payload: bytes) -> None:
        await call.write(payload)
        await call.read()

    def close(self) -> None:
        """End the streams."""

        async def close() -> None:
            for channel in self._channels:
                await channel.close()

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()


if __name__ == "__main__":
    uvloop.run(_serve())
