"""Whom the forwards of a model's thread are for: what their requests allow, and who is told."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from expertmesh.router.selection_options import SelectionOptions
from expertmesh.runtime.missing_experts import DegradedMass, Policy


@dataclass(frozen=True)
class RoutingOptions:
    """How the tokens of a request are routed; None is as the mesh is configured."""

    missing_experts: Policy | None = None
    selection: SelectionOptions | None = None


@dataclass(frozen=True)
class ForwardScope:
    """Of the forwards that a thread runs now."""

    options: RoutingOptions = RoutingOptions()
    shares: Sequence[tuple[int, DegradedMass]] = field(default=())
    """How many consecutive tokens of each forward belong to a request, and where that request
    counts what missing experts cost it."""

    def account(self, mass_T: Sequence[float]) -> None:
        """Tell everyone what the layer cost them.

        Where the shares do not add up to the tokens, every request is told of all of them: it may
        hear of more than it lost, never of less.
        """
        if sum(num_tokens for num_tokens, _ in self.shares) != len(mass_T):
            for _, degraded in self.shares:
                degraded.add(mass_T)
            return
        start = 0
        for num_tokens, degraded in self.shares:
            degraded.add(mass_T[start : start + num_tokens])
            start += num_tokens


def whole(degraded: DegradedMass, options: RoutingOptions = RoutingOptions()) -> ForwardScope:
    """Of forwards that belong to one request."""
    return ForwardScope(options, ((-1, degraded),))


Serving = Callable[[ForwardScope], AbstractContextManager[None]]
"""Makes a scope that of the thread's forwards, for a `with` block."""


def to_nobody(scope: ForwardScope) -> AbstractContextManager[None]:
    """The `Serving` of a model whose experts take no options."""
    return nullcontext()
