"""Waiting for a condition with a deadline: what tests do instead of sleeping."""

import asyncio
import time
from collections.abc import Callable


async def until(condition: Callable[[], bool], *, deadline_s: float = 10.0) -> float:
    """Let the event loop run until `condition()` holds; how long that took, in seconds.

    Raises:
        TimeoutError: it did not hold within `deadline_s`.
    """
    start_s = time.monotonic()
    while not condition():
        if time.monotonic() - start_s > deadline_s:
            raise TimeoutError(f"not within {deadline_s:g} s: {condition}")
        await asyncio.sleep(0.005)
    return time.monotonic() - start_s
