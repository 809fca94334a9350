"""The model's thread calling the router core of its own process.

T tokens, D hidden size, K experts per token.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import torch

from expertmesh.router.core import DEFAULT_TIMEOUT_S, RouterCore
from expertmesh.router.servicer import COMBINE_MODES


class CoreCaller:
    """An ExpertCaller over a router core that lives on an event loop of this process.

    Args:
        loop: the core's loop; `dispatch` must be called from another thread.
        callers: traceparents of the requests that the running forward belongs to.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        callers: Callable[[], Sequence[str]] = lambda: (),
    ) -> None:
        self._loop = loop
        self.callers = callers
        self.core: RouterCore | None = None
        """Set once the model's layers are known, before the first forward."""

    def dispatch(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        experts_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        combine: int,
    ) -> torch.Tensor:
        """See `ExpertCaller.dispatch`."""
        assert self.core is not None
        # no inference_mode around it: that is the loop thread's state, not this call's, and calls
        # overlap there
        call = self.core.dispatch(
            layer,
            hidden_TD.cpu(),  # no copies, unless the model is on a GPU
            experts_TK.cpu(),
            weights_TK.cpu(),
            COMBINE_MODES[combine],
            DEFAULT_TIMEOUT_S,
            self.callers(),
        )
        return self._wait(call).to(hidden_TD.device)

    def _wait(self, call: Coroutine[Any, Any, torch.Tensor]) -> torch.Tensor:
        """The call's result: `asyncio.run_coroutine_threadsafe` with half of its wake-ups."""
        done = threading.Lock()
        done.acquire()
        tasks: list[asyncio.Task[torch.Tensor]] = []

        def start() -> None:
            task = self._loop.create_task(call)
            tasks.append(task)
            task.add_done_callback(lambda _: done.release())

        self._loop.call_soon_threadsafe(start)
        done.acquire()
        return tasks[0].result()
