"""The router core: plan, fan out, collect, combine. Gateways embed it, RouterService wraps it.

T tokens, D hidden size, K experts per token, R rows. A slot is one (token, k) pair.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from random import Random

import torch

from expertmesh.router.calls import LayerCall
from expertmesh.router.combine import CombineMode, combine
from expertmesh.router.failover import FailoverSettings
from expertmesh.router.fanout import Fanout
from expertmesh.router.live_mesh import LiveMesh
from expertmesh.router.plan import Shipment, slots_of_call
from expertmesh.router.shipping import STAGE, Shipper
from expertmesh.router.usage import ExpertUsage
from expertmesh.router.validate import check_routing
from expertmesh.runtime.errors import ExpertMeshError
from expertmesh.runtime.origin import ANYONE, Origin
from expertmesh.runtime.security.access import PLAIN, Access
from expertmesh.runtime.telemetry import Telemetry

DEFAULT_TIMEOUT_S = 30.0


class RouterCore(LiveMesh):
    """Routes the rows of one model.

    Args:
        model: name the replicas' experts must belong to.
        num_experts: experts of each MoE layer of the model.
        max_message_bytes: larger shipments are refused.
        failover: when a second copy is asked.
        clock: seconds, monotonic.
        access: how to connect to replicas.
    """

    def __init__(
        self,
        model: str,
        num_experts: Mapping[int, int],
        telemetry: Telemetry,
        *,
        max_message_bytes: int,
        failover: FailoverSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: Random | None = None,
        access: Access = PLAIN,
    ) -> None:
        shipper = Shipper(
            model, telemetry, max_message_bytes, clock, failover or FailoverSettings(), access
        )
        super().__init__(model, num_experts, shipper, clock, random or Random())
        self.usage = ExpertUsage(num_experts)
        self._telemetry = telemetry
        self._calls = telemetry.metrics.calls.share(STAGE, "dispatch")
        self._tokens = telemetry.metrics.tokens.share(STAGE)

    # -- one call --------------------------------------------------------------------------------

    async def dispatch(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        experts_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        mode: CombineMode,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        callers: Sequence[str] = (),
        origin: Origin = ANYONE,
    ) -> torch.Tensor:
        """Weighted sum over each token's experts: [T, D] in the dtype of `hidden_TD`.

        Args:
            callers: traceparents of the requests these tokens belong to, if the current span is
                not theirs. The first is the parent of the call's span, the others are linked.
            origin: whose rows they are and how urgent: for their turn at busy replicas.

        Raises:
            InvalidInput, UnknownExpert: the request is wrong.
            ExpertUnavailable: an expert has no live replica.
            QueueFull, CannotMakeIt: every replica of an expert is overloaded.
            WeightsUnavailable: none of its replicas gets its weights onto a device.
            DeadlineExceeded: `timeout_s` passed.
        """
        with self.call(layer, callers):
            check_routing(layer, hidden_TD, experts_TK, weights_TK, self.num_experts)
            out_TKD = await self.outputs(
                layer, hidden_TD, experts_TK, mode, timeout_s, origin=origin
            )
            return combine(out_TKD, weights_TK, experts_TK, mode, hidden_TD.dtype)

    @contextmanager
    def call(self, layer: int, callers: Sequence[str] = ()) -> Iterator[None]:
        """Around `outputs`: the span of a call, and the counts of calls and failures."""
        self._calls.value += 1
        parent = callers[0] if callers else ""
        with self._telemetry.span("router.dispatch", parent=parent, links=callers[1:]) as span:
            span.set_attribute("expertmesh.layer", layer)
            try:
                yield
            except ExpertMeshError as error:
                self._metrics.errors.add(1, STAGE, error.code.name)
                raise

    async def outputs(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        experts_TK: torch.Tensor,
        mode: CombineMode,
        timeout_s: float,
        dropped: Set[int] = frozenset(),
        origin: Origin = ANYONE,
    ) -> torch.Tensor:
        """[T, K, D] unweighted outputs, inside of `call` and after `check_routing`; zeros for the
        experts in `dropped`, which are not asked for. Raises as `dispatch`."""
        experts_S = _experts_of_slots(experts_TK)
        slots = slots_of_call(experts_S, experts_TK, mode)
        if dropped:
            slots = {expert: own for expert, own in slots.items() if expert not in dropped}
        self.usage.count(layer, slots)
        self._tokens.value += hidden_TD.shape[0]
        new = hidden_TD.new_zeros if dropped else hidden_TD.new_empty
        outputs_SD = new((len(experts_S), hidden_TD.shape[1]))
        call = LayerCall(layer, hidden_TD, experts_S, outputs_SD, origin)
        await Fanout(call, self._shipper, self).run(slots, timeout_s)
        return outputs_SD.view(*experts_TK.shape, -1)

    def plan_call(self, layer: int, experts_TK: torch.Tensor) -> list[Shipment]:
        """Where the rows of a call would go now.

        Raises:
            ExpertUnavailable: an expert has no live replica.
        """
        experts_S = _experts_of_slots(experts_TK)
        return self.plan(layer, slots_of_call(experts_S, experts_TK, "slot_sum"), {}, ())


def _experts_of_slots(experts_TK: torch.Tensor) -> list[int]:
    if experts_TK.shape[0] == 1:  # 0.3 us; with a reshape 0.8
        own: list[int] = experts_TK.tolist()[0]
        return own
    experts_S: list[int] = experts_TK.reshape(-1).tolist()
    return experts_S
