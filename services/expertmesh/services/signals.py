"""Ctrl-C and SIGTERM while something starts, runs or stops."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def cancelled_by_signals() -> Iterator[Callable[[], None]]:
    """The first signal cancels the current task, which cleans up; a second acts as if unhandled.

    Yields a function that handles the signals again after a library has replaced the handlers.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task

    def cancel() -> None:
        unhandle()
        task.cancel()

    def handle() -> None:
        for signum in _SIGNALS:
            loop.add_signal_handler(signum, cancel)

    def unhandle() -> None:
        for signum in _SIGNALS:
            loop.remove_signal_handler(signum)

    handle()
    try:
        yield handle
    finally:
        unhandle()


async def forever() -> None:
    """Until cancelled; then it returns, as if that was all that was waited for."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task
        task.uncancel()
