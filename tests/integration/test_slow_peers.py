"""A replica that accepts connections and takes nothing costs a router bounded memory."""

import asyncio
from typing import Any

import grpc
import pytest

from expertmesh.router.links import open_link
from expertmesh.router.outgoing import MAX_UNSENT_BYTES
from expertmesh.runtime import frames
from expertmesh.runtime.errors import QueueFull


@pytest.mark.parametrize("local", [True, False])
async def test_a_replica_that_takes_nothing_costs_a_router_no_memory(local: bool) -> None:
    wanted = set(range(1, 100_000))
    message = bytes(1 << 20)
    async with _Silent() as silent:
        name = silent.socket_name if local else ""
        link = open_link(
            silent.address,
            name,
            2 << 20,
            lambda data: None,
            lambda error: None,
            wanted.__contains__,
        )
        sent = 0

        async def send_all() -> None:
            nonlocal sent
            while True:
                link.check_room(len(message))
                sent += 1
                link.send(sent, message)
                await asyncio.sleep(0)

        with pytest.raises(QueueFull, match="bytes wait for a replica that takes none"):
            await send_all()
        most = MAX_UNSENT_BYTES // len(message)
        assert most <= sent <= most + 24, "and what the kernel and gRPC have taken"
        assert link._outgoing.num_bytes <= MAX_UNSENT_BYTES  # type: ignore[attr-defined]
        wanted.clear()  # the callers have given up
        link.check_room(len(message))
        assert link._outgoing.num_bytes == 0  # type: ignore[attr-defined]
        await link.close()


class _Silent:
    """A process that accepts connections and reads nothing."""

    async def __aenter__(self) -> "_Silent":
        self.socket_name = f"expertmesh-silent-{id(self)}"
        self._listener = frames.listen(self.socket_name)
        self._over = asyncio.Event()

        async def never_reads(requests: Any, context: Any) -> None:
            await self._over.wait()

        self._server = grpc.aio.server()
        handlers: dict[str, Any] = {
            "ComputeStream": grpc.stream_stream_rpc_method_handler(never_reads)
        }
        service = grpc.method_handlers_generic_handler("expertmesh.v1.ExpertService", handlers)
        self._server.add_generic_rpc_handlers((service,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._over.set()
        await self._server.stop(0)
        self._listener.close()
