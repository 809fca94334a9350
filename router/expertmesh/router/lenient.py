"""Calls that go on without the experts that are missing, as far as their callers allow.

T tokens, D hidden size, K experts per token.
"""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from expertmesh.router.combine import CombineMode, combine
from expertmesh.router.core import DEFAULT_TIMEOUT_S, RouterCore
from expertmesh.router.degrade import Asked, Reduced, reduce
from expertmesh.router.missing import cause_of, expert_unavailable, missing_in
from expertmesh.router.validate import check_routing
from expertmesh.runtime.errors import ExpertUnavailable
from expertmesh.runtime.metrics import Metrics


@dataclass(frozen=True, eq=False)
class Answer:
    """What a call has come to."""

    hidden_TD: torch.Tensor
    """Weighted sum over each token's experts."""
    experts_TK: torch.Tensor
    """Those in the sum; -1 in the place of one that was missing and has no substitute."""
    weights_TK: torch.Tensor
    degraded_mass_T: torch.Tensor
    """float32: share of a token's weights that was for missing experts; 0 if it is exact."""
    is_degraded: bool = False
    """Whether any token is."""


@dataclass(frozen=True, eq=False)
class _Call:
    """What stays while a call starts again."""

    layer: int
    hidden_TD: torch.Tensor
    mode: CombineMode
    timeout_s: float


class LenientCalls:
    """The last rungs of the failure ladder, over a core that has climbed the others."""

    def __init__(self, core: RouterCore, metrics: Metrics) -> None:
        self._core = core
        self._metrics = metrics

    async def dispatch(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        asked: Asked,
        mode: CombineMode,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        callers: Sequence[str] = (),
    ) -> Answer:
        """`RouterCore.dispatch`, as far as the policy of `asked` goes.

        Experts that die while the call is under way are missing from then on, and the call starts
        again without them, within the same time.

        Raises:
            ExpertUnavailable: an expert has no live replica and the policy is "strict", or all
                that is left of some token is nothing.
            ExpertMeshError: as `RouterCore.dispatch`.
        """
        core, experts_TK, weights_TK = self._core, asked.experts_TK, asked.weights_TK
        if asked.policy == "strict":
            out_TD = await core.dispatch(
                layer, hidden_TD, experts_TK, weights_TK, mode, timeout_s, callers, asked.origin
            )
            return Answer(out_TD, experts_TK, weights_TK, torch.zeros(len(experts_TK)))
        with core.call(layer, callers):
            check_routing(layer, hidden_TD, experts_TK, weights_TK, core.num_experts)
            out_TD, reduced = await self._reduced(layer, hidden_TD, asked, mode, timeout_s)
        mass_T, is_degraded = reduced.degraded_mass_T, reduced.is_degraded
        if is_degraded:
            for mass in mass_T[mass_T > 0].tolist():
                self._metrics.degraded_mass.record(mass, core.model)
        return Answer(
            out_TD, reduced.told_experts(), reduced.weights_TK, mass_T, is_degraded=is_degraded
        )

    async def _reduced(
        self, layer: int, hidden_TD: torch.Tensor, asked: Asked, mode: CombineMode, timeout_s: float
    ) -> tuple[torch.Tensor, Reduced]:
        core = self._core
        deadline_s = core.now_s() + timeout_s
        causes: dict[int, str] = {}
        dead = self._dead(layer)
        while True:
            reduced = reduce(asked, dead)
            self._check_left(layer, asked, reduced, dead, causes)
            call = _Call(layer, hidden_TD, mode, deadline_s - core.now_s())
            try:
                out_TD = await self._combined(call, asked, reduced, dead)
            except ExpertUnavailable as error:
                learned = missing_in(error) - dead
                if not learned:
                    raise
                causes |= dict.fromkeys(learned, error.fields.get("cause", error.message))
                dead = dead | learned | self._dead(layer)
            else:
                return out_TD, reduced

    async def _combined(
        self, call: "_Call", asked: Asked, reduced: Reduced, dead: Set[int]
    ) -> torch.Tensor:
        """The sum over live experts and substitutes.

        Substitutes are asked for apart: with the rows of other tokens in the product of an expert,
        the bits of tokens that miss nothing would change. For the same reason the others keep the
        order that all ids together give them.
        """
        outputs = partial(self._core.outputs, call.layer, origin=asked.origin)
        dropped = dead if reduced.is_degraded else frozenset[int]()
        parts = [outputs(call.hidden_TD, asked.experts_TK, call.mode, call.timeout_s, dropped)]
        mended_TK = reduced.mended_TK
        if bool(mended_TK.any()):
            tokens_R, _ = mended_TK.nonzero(as_tuple=True)
            experts_R1 = reduced.experts_TK[mended_TK].unsqueeze(1)
            rows_RD = call.hidden_TD[tokens_R]
            parts.append(outputs(rows_RD, experts_R1, call.mode, call.timeout_s))
        outputs_TKD, *others = await _both(parts)
        for own_R1D in others:
            outputs_TKD[mended_TK] = own_R1D.squeeze(1)
        dtype = call.hidden_TD.dtype
        return combine(outputs_TKD, reduced.weights_TK, reduced.experts_TK, call.mode, dtype)

    def _dead(self, layer: int) -> frozenset[int]:
        """The experts of the layer that no replica takes work for, as far as is known."""
        held = self._core.snapshot.holders
        return frozenset(e for e in range(self._core.num_experts[layer]) if (layer, e) not in held)

    def _check_left(
        self,
        layer: int,
        asked: Asked,
        reduced: Reduced,
        dead: Set[int],
        causes: Mapping[int, str],
    ) -> None:
        """Raises ExpertUnavailable if nothing is left of some token."""
        lost_T = reduced.lost_T
        if not bool(lost_T.any()):
            return
        token = int(lost_T.nonzero()[0])
        missing = [expert for expert in sorted(asked.experts_TK[token].tolist()) if expert in dead]
        own = causes.get(missing[0]) or cause_of(layer, missing[0], self._core.snapshot, {})
        cause = f"{own}; nothing is left of token {token}, so {asked.policy} cannot help"
        raise expert_unavailable(self._core.model, layer, missing, cause)


async def _both(parts: Sequence[Coroutine[Any, Any, torch.Tensor]]) -> list[torch.Tensor]:
    """All results; if one fails, the others are given up."""
    if len(parts) == 1:
        return [await parts[0]]
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
