"""Layer calls to a router that come when they come, whether or not earlier ones are answered.

T tokens, D hidden size, K top-k.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import torch

from expertmesh.runtime.channels import connect
from expertmesh.runtime.tensors import to_proto
from expertmesh.v1 import router_pb2


@dataclass(frozen=True)
class Outcome:
    """How one call ended."""

    began_s: float
    took_s: float
    code: str

    @property
    def is_good(self) -> bool:
        """Whether it has its answer."""
        return self.code == "OK"

    @property
    def is_refused(self) -> bool:
        """Whether it was turned away without being begun."""
        return self.code == "RESOURCE_EXHAUSTED"


def requests_of(tokens: int, hidden_size: int, experts: int, top_k: int) -> list[bytes]:
    """Encoded DispatchRequests with random routing."""
    rng = torch.Generator().manual_seed(1)
    found = []
    for _ in range(16):
        weights_TK, experts_TK = torch.rand(tokens, experts, generator=rng).topk(top_k)
        hidden_TD = torch.randn(tokens, hidden_size, generator=rng)
        request = router_pb2.DispatchRequest(
            hidden=to_proto(hidden_TD), experts=to_proto(experts_TK), weights=to_proto(weights_TK)
        )
        found.append(request.SerializeToString())
    return found


class Offered:
    """Calls over some connections, each of which is a caller of its own.

    Args:
        address: of the router.
        deadline_s: of each call.
    """

    def __init__(
        self, address: str, connections: int, requests: Sequence[bytes], deadline_s: float
    ) -> None:
        self._channels = [connect(address) for _ in range(connections)]
        name = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name
        # bytes in, bytes out: what is measured is the mesh, not the caller's protobuf
        self._calls: list[Any] = [
            channel.unary_unary(f"/{name}/Dispatch") for channel in self._channels
        ]
        self._requests = requests
        self._deadline_s = deadline_s
        self._random = random.Random(7)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for channel in self._channels:
            await channel.close()

    async def call(self, number: int) -> Outcome:
        """One call, over one connection after the other."""
        send = self._calls[number % len(self._calls)]
        began_s = time.perf_counter()
        code = "OK"
        try:
            await send(self._requests[number % len(self._requests)], timeout=self._deadline_s)
        except grpc.aio.AioRpcError as error:
            code = error.code().name
        return Outcome(began_s, time.perf_counter() - began_s, code)

    async def closed(self, callers: int, seconds: float) -> list[Outcome]:
        """Each caller calls again when it is answered."""
        end_s = time.perf_counter() + seconds
        found: list[Outcome] = []

        async def loop(number: int) -> None:
            while time.perf_counter() < end_s:
                found.append(await self.call(number))

        await asyncio.gather(*(loop(number) for number in range(callers)))
        return found

    async def open(self, calls_per_s: float, seconds: float) -> list[Outcome]:
        """Calls at random times, as many a second on average; returns when the last has ended."""
        due_s = time.perf_counter()
        end_s = due_s + seconds
        tasks: list[asyncio.Task[Outcome]] = []
        while due_s < end_s:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            tasks.append(asyncio.create_task(self.call(len(tasks))))
            due_s += self._random.expovariate(calls_per_s)
        return await asyncio.gather(*tasks)
