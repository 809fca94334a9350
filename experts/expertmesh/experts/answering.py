"""The requests of one connection that are being answered; callers may take them back."""

import asyncio
from collections.abc import Callable

from expertmesh.runtime.errors import Cancelled
from expertmesh.v1 import expert_pb2

Reply = tuple[expert_pb2.ComputeResponse, memoryview]
"""Header and rows, for `wire`."""


class Answering:
    """Tasks that answer requests, by the ids of these.

    Args:
        send: sends the answer to a request that was taken back: who asks learns from it that
            the replica is alive and that the rows do not wait any more.
    """

    def __init__(self, send: Callable[[Reply], object]) -> None:
        self._send = send
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def add(self, number: int, task: asyncio.Task[None]) -> None:
        """Until it is done. While an id is in use, a second request with it cannot be cancelled."""
        key = number if number not in self._tasks else -len(self._tasks) - 1
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key, None))

    def cancel(self, request: expert_pb2.ComputeRequest) -> bool:
        """Stop answering what the request takes back. Returns whether that is all it says."""
        for number in request.cancels:
            task = self._tasks.get(number)
            if task and task.cancel():
                task.add_done_callback(lambda done, number=number: self._taken_back(number, done))  # type: ignore[misc]
        return not request.experts

    def _taken_back(self, number: int, task: asyncio.Task[None]) -> None:
        if task.cancelled():  # else its answer was faster
            error = Cancelled("the caller has taken the request back").to_status()
            self._send((expert_pb2.ComputeResponse(id=number, error=error), memoryview(b"")))

    def cancel_all(self) -> None:
        """The connection is gone."""
        for task in list(self._tasks.values()):
            task.cancel()

    async def finish(self) -> None:
        """Until every request so far is answered."""
        while self._tasks:
            await asyncio.wait(list(self._tasks.values()))
