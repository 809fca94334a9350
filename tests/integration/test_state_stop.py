"""A watcher stops whatever it is doing at that moment."""

import asyncio

from expertmesh.runtime.state import MeshWatcher


async def test_a_watcher_stops_in_the_middle_of_a_command(redis_url: str) -> None:
    """On Python 3.11 a cancellation that meets redis-py in a send is lost: asyncio.wait_for
    returns the result of what has just finished instead."""
    for _ in range(5):
        async with MeshWatcher(redis_url, "stop", print, print, resync_s=1e-6) as watcher:
            await asyncio.wait_for(watcher.synced.wait(), 5)
        assert watcher._task is not None
        assert watcher._task.done()
