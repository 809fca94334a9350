"""Ending asyncio tasks for good."""

import asyncio
from typing import Any

_AGAIN_S = 0.02


async def end(task: "asyncio.Task[Any]") -> None:
    """Cancel a task and wait until it has ended, however it does.

    It is cancelled until it heeds it: `asyncio.wait_for` of Python < 3.12, which redis-py calls,
    can lose a cancellation (https://github.com/python/cpython/issues/86296).
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_AGAIN_S)
