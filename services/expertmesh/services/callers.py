"""The model's thread calling the router core of its own process.

T tokens, D hidden size, K experts per token.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from expertmesh.router.combine import CombineMode
from expertmesh.router.core import DEFAULT_TIMEOUT_S, RouterCore
from expertmesh.router.degrade import Asked
from expertmesh.router.gate import Scored
from expertmesh.router.lenient import Answer, LenientCalls
from expertmesh.router.selection_options import SelectionOptions
from expertmesh.router.selector import Selector
from expertmesh.router.servicer import COMBINE_MODES
from expertmesh.runtime.errors import UnsupportedCheckpoint
from expertmesh.runtime.missing_experts import Policy
from expertmesh.runtime.origin import ANYONE, Origin
from expertmesh.services.forward_scope import ForwardScope, RoutingOptions

_LEAST_SAME_FRAC = 0.5
_Result = TypeVar("_Result")


class CoreCaller:
    """An ExpertCaller over a router core that lives on an event loop of this process.

    Args:
        loop: the core's loop; `dispatch` must be called from another thread.
        callers: traceparents of the requests that the running forward belongs to.
        origin: whose that forward is.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        callers: Callable[[], Sequence[str]] = lambda: (),
        origin: Callable[[], Origin] = lambda: ANYONE,
    ) -> None:
        self._loop = loop
        self.callers = callers
        self.origin = origin
        self.core: RouterCore | None = None
        """Set once the model's layers are known, before the first forward."""
        self.lenient: LenientCalls | None = None
        """Over that core; for calls that need not be exact."""
        self.selector: Selector | None = None
        """Selects experts if they are not to be the gate's own choice, or are missing."""
        self.policy: Policy = "strict"
        """Where experts are missing; requests may have another one."""
        self._own = threading.local()
        """`scope`: of the thread's forwards."""
        self._checked: set[int] = set()
        """Layers whose gate was seen to choose as the model does."""

    @contextmanager
    def serving(self, scope: ForwardScope) -> Iterator[None]:
        """The forwards of this thread are of that scope while the block runs."""
        self._own.scope = scope
        try:
            yield
        finally:
            del self._own.scope

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
        scope: ForwardScope = getattr(self._own, "scope", _PLAIN)
        policy, selection = self._options(scope.options)
        # no copies, unless the model is on a GPU
        own_TD, experts_TK, weights_TK = hidden_TD.cpu(), experts_TK.cpu(), weights_TK.cpu()
        mode, callers, origin = COMBINE_MODES[combine], self.callers(), self.origin()
        # no inference_mode around it: that is the loop thread's state, not this call's, and calls
        # overlap there
        if policy == "strict" and selection is None:
            call = self.core.dispatch(
                layer, own_TD, experts_TK, weights_TK, mode, DEFAULT_TIMEOUT_S, callers, origin
            )
            return self._wait(call).to(hidden_TD.device)
        asked = Asked(experts_TK, weights_TK, policy, origin=origin)
        answer = self._wait(self._answer(layer, own_TD, asked, mode, callers, selection))
        scope.account(answer.degraded_mass_T.tolist())
        return answer.hidden_TD.to(hidden_TD.device)

    def _options(self, asked: RoutingOptions) -> tuple[Policy, SelectionOptions | None]:
        """The policy, and the selection if it need not be exact."""
        selection = asked.selection
        if selection is None and self.selector is not None:
            selection = self.selector.default
        is_exact = selection is None or selection.is_exact
        return asked.missing_experts or self.policy, None if is_exact else selection

    async def _answer(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        asked: Asked,
        mode: CombineMode,
        callers: Sequence[str],
        selection: SelectionOptions | None,
    ) -> Answer:
        """With the experts that the selector chooses in place of the model's own choice, and those
        that the policy allows where some are missing."""
        assert self.lenient is not None
        if selection is None:
            scored = lambda: self._scored(layer, hidden_TD, asked.experts_TK)  # noqa: E731
            asked = replace(asked, scored=scored)
            return await self.lenient.dispatch(
                layer, hidden_TD, asked, mode, DEFAULT_TIMEOUT_S, callers
            )
        assert self.selector is not None
        selected = self.selector.select(layer, hidden_TD, selection)
        self._check_gate(layer, selected.scored, asked.experts_TK, "selection")
        chosen = selected.selection
        asked = replace(
            asked,
            experts_TK=chosen.experts_TK,
            weights_TK=chosen.weights_TK,
            scored=lambda: selected.scored,
        )
        answer = await self.lenient.dispatch(
            layer, hidden_TD, asked, mode, DEFAULT_TIMEOUT_S, callers
        )
        if not answer.is_degraded:  # what it lost was not selection's choice
            out_TD = answer.hidden_TD
            self.selector.account(layer, hidden_TD, out_TD, chosen.given_up_T, selection)
        return answer

    def _scored(self, layer: int, hidden_TD: torch.Tensor, experts_TK: torch.Tensor) -> Scored:
        assert self.selector is not None
        scored = self.selector.scored(layer, hidden_TD, "missing_experts")
        self._check_gate(layer, scored, experts_TK, "missing_experts")
        return scored

    def _check_gate(self, layer: int, scored: Scored, experts_TK: torch.Tensor, field: str) -> None:
        if layer not in self._checked:
            check_gate(layer, scored, experts_TK, field)
            self._checked.add(layer)

    def _wait(self, call: Coroutine[Any, Any, _Result]) -> _Result:
        """The call's result: `asyncio.run_coroutine_threadsafe` with half of its wake-ups."""
        done = threading.Lock()
        done.acquire()
        results: list[_Result] = []
        errors: list[BaseException] = []
        tasks: list[asyncio.Task[None]] = []  # the loop itself keeps none alive

        async def run() -> None:
            try:
                results.append(await call)
            except BaseException as error:
                errors.append(error)
            finally:
                done.release()  # here, as a done callback would run a turn of the loop later

        self._loop.call_soon_threadsafe(lambda: tasks.append(self._loop.create_task(run())))
        done.acquire()
        if errors:
            raise errors[0]
        return results[0]


_PLAIN = ForwardScope()


def check_gate(layer: int, scored: Scored, experts_TK: torch.Tensor, field: str) -> None:
    """A model whose experts see other hidden states than its gate cannot be routed again from what
    its experts get; a near tie that falls the other way is not the end of it.

    Raises:
        UnsupportedCheckpoint: the model chose other experts; names the field that needs the gate.
    """
    own_TK = scored.top(experts_TK.shape[1])
    same_T = (own_TK.sort(1).values == experts_TK.sort(1).values).all(1)
    if float(same_T.float().mean()) < _LEAST_SAME_FRAC:
        raise UnsupportedCheckpoint(
            f"{field}: in layer {layer} the gate chooses other experts for what the experts get; "
            "this model selects exactly: quality_budget, top_k and max_groups 0, and missing "
            "experts are not substituted",
            layer=layer,
        )
