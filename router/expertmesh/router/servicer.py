"""RouterService: the router core for callers with their own hidden states.

T tokens, D hidden size, K experts per token, R rows (T * K), P padded rows.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from opentelemetry.trace import Span, SpanKind

from expertmesh.router.combine import CombineMode
from expertmesh.router.core import RouterCore
from expertmesh.router.degrade import Asked
from expertmesh.router.explain import Explanation
from expertmesh.router.gate import route
from expertmesh.router.lenient import Answer, LenientCalls
from expertmesh.router.selection_options import SelectionOptions
from expertmesh.router.selector import Selector
from expertmesh.router.served_model import ServedModel
from expertmesh.router.validate import check_finite, check_hidden
from expertmesh.runtime.dense_rows import pad_to_dense
from expertmesh.runtime.errors import InvalidInput, UnknownModel
from expertmesh.runtime.in_flight import InFlight
from expertmesh.runtime.missing_experts import Policy, policy_of
from expertmesh.runtime.origin import Origin, caller_of, priority_of
from expertmesh.runtime.telemetry import Telemetry
from expertmesh.runtime.tensors import aligned, dtype_name, from_proto, to_proto
from expertmesh.runtime.trace_context import traceparent_of
from expertmesh.v1 import router_pb2, router_pb2_grpc

MAX_EXPLAINED = 16
SERVICE = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name

COMBINE_MODES: dict[int, CombineMode] = {
    router_pb2.COMBINE_SLOT_SUM: "slot_sum",
    router_pb2.COMBINE_EAGER: "eager",
}


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Serves one model over a router core.

    Args:
        selector: selects experts for `Forward` and `Explain`.
        call_timeout_s: for callers that give no deadline.
        reject_nonfinite: refuse hidden states with NaN or infinity.
        missing_experts: policy of calls that say nothing.
        in_flight: bounds what is worked on at the same time; None: nothing does.
        caller_of: whose a call is, by its gRPC context.
    """

    def __init__(
        self,
        model: ServedModel,
        core: RouterCore,
        telemetry: Telemetry,
        selector: Selector,
        *,
        call_timeout_s: float,
        reject_nonfinite: bool = False,
        missing_experts: Policy = "strict",
        in_flight: InFlight | None = None,
        caller_of: Callable[[Any], str] = caller_of,
    ) -> None:
        self._model = model
        self._core = core
        self._telemetry = telemetry
        self._selector = selector
        self._call_timeout_s = call_timeout_s
        self._reject_nonfinite = reject_nonfinite
        self._missing_experts = missing_experts
        self._calls = LenientCalls(core, telemetry.metrics)
        self._in_flight = in_flight
        self._caller_of = caller_of

    async def Dispatch(
        self, request: router_pb2.DispatchRequest, context: Any
    ) -> router_pb2.DispatchResponse:
        """Rows already routed."""
        with self._span(context, "router.Dispatch"):
            self._check_model(request.model)
            hidden_TD = self._hidden(request.layer, request.hidden)
            asked = Asked(
                from_proto(request.experts, "experts"),
                self._weights(request.weights),
                self._policy_without_gate(request.missing_experts),
                origin=self._origin(request, context),
            )
            mode = self._mode(request.layer, request.combine)
            timeout_s = self._timeout_s(context)
            with self._admitted(asked.origin, hidden_TD):
                answer = await self._calls.dispatch(
                    request.layer, hidden_TD, asked, mode, timeout_s
                )
                return router_pb2.DispatchResponse(
                    hidden=to_proto(answer.hidden_TD), degraded_mass=answer.degraded_mass_T.tolist()
                )

    async def Forward(
        self, request: router_pb2.ForwardRequest, context: Any
    ) -> router_pb2.ForwardResponse:
        """The router owns the gate."""
        with self._span(context, "router.Forward"):
            self._check_model(request.model)
            hidden_TD = self._hidden(request.layer, request.hidden)
            options = self._selector.options(request)
            policy = policy_of(request.missing_experts, self._missing_experts)
            timeout_s = self._timeout_s(context)
            if policy == "substitute":
                self._selector.check(request.layer, "missing_experts")
            origin = self._origin(request, context)
            with self._admitted(origin, hidden_TD):
                if options.is_exact:
                    layer = request.layer
                    answer = await self._forward_exact(layer, hidden_TD, policy, timeout_s, origin)
                    return _forward_response(answer, request.return_routing)
                return await self._forward_selected(
                    request, hidden_TD, options, policy, timeout_s, origin
                )

    async def _forward_exact(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        policy: Policy,
        timeout_s: float,
        origin: Origin,
    ) -> Answer:
        gate = self._model.gate(layer)
        with self._telemetry.span("router.gate"), torch.inference_mode():
            routing = route(gate.spec, hidden_TD, gate.weights)
        scored = lambda: self._selector.scored(layer, hidden_TD, "missing_experts")  # noqa: E731
        asked = Asked(routing.experts_TK, routing.weights_TK, policy, scored, origin)
        send = self._send_scaled if gate.spec.apply == "before" else self._calls.dispatch
        return await send(layer, hidden_TD, asked, gate.spec.combine, timeout_s)

    async def _forward_selected(
        self,
        request: router_pb2.ForwardRequest,
        hidden_TD: torch.Tensor,
        options: SelectionOptions,
        policy: Policy,
        timeout_s: float,
        origin: Origin,
    ) -> router_pb2.ForwardResponse:
        layer = request.layer
        with self._telemetry.span("router.select"):
            selected = self._selector.select(layer, hidden_TD, options)
        chosen, scored = selected.selection, selected.scored
        asked = Asked(chosen.experts_TK, chosen.weights_TK, policy, lambda: scored, origin)
        mode = scored.spec.combine
        answer = await self._calls.dispatch(layer, hidden_TD, asked, mode, timeout_s)
        if not answer.is_degraded:  # what it lost was not selection's choice
            out_TD = answer.hidden_TD
            self._selector.account(layer, hidden_TD, out_TD, chosen.given_up_T, options)
        response = _forward_response(answer, request.return_routing)
        response.given_up_mass.extend(chosen.given_up_T.tolist())
        return response

    async def Explain(
        self, request: router_pb2.ExplainRequest, context: Any
    ) -> router_pb2.ExplainResponse:
        """Why a call would go where it goes."""
        self._check_model(request.model)
        hidden_TD = self._hidden(request.layer, request.hidden)
        if len(hidden_TD) > MAX_EXPLAINED:
            expected = f"at most {MAX_EXPLAINED} tokens"
            raise InvalidInput.of("hidden.shape", expected=expected, got=list(hidden_TD.shape))
        selected = self._selector.select(request.layer, hidden_TD, self._selector.options(request))
        now_s = self._core.now_s()
        return Explanation(self._core, request.layer, selected, now_s).response()

    async def ListModels(
        self, request: router_pb2.ListModelsRequest, context: Any
    ) -> router_pb2.ListModelsResponse:
        """The one model served."""
        return router_pb2.ListModelsResponse(models=[self._model.info()])

    async def _send_scaled(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        asked: Asked,
        mode: CombineMode,
        timeout_s: float,
    ) -> Answer:
        """Weights scale the experts' inputs (llama4): each slot is a row of its own, and nothing is
        left of it without its expert."""
        num_tokens, top_k = asked.experts_TK.shape
        rows_RD = (hidden_TD.unsqueeze(1) * asked.weights_TK.unsqueeze(-1)).flatten(0, 1)
        experts_R = asked.experts_TK.reshape(-1)
        padded_PD, experts_P = pad_to_dense(rows_RD, experts_R, num_tokens)
        ones_P1 = torch.ones_like(experts_P, dtype=rows_RD.dtype).unsqueeze(1)
        out_PD = await self._core.dispatch(
            layer, padded_PD, experts_P.unsqueeze(1), ones_P1, mode, timeout_s, origin=asked.origin
        )
        out_TD = out_PD[: len(rows_RD)].view(num_tokens, top_k, -1).sum(dim=1)
        return Answer(out_TD, asked.experts_TK, asked.weights_TK, torch.zeros(num_tokens))

    def _policy_without_gate(self, value: int) -> Policy:
        if value == router_pb2.MISSING_EXPERTS_SUBSTITUTE:
            raise InvalidInput.of(
                "missing_experts",
                expected="STRICT or RENORMALISE",
                got="SUBSTITUTE",
                hint="Dispatch knows no gate scores; Forward does.",
            )
        policy = policy_of(value, self._missing_experts)
        return "renormalise" if policy == "substitute" else policy

    def _span(self, context: Any, name: str) -> AbstractContextManager[Span]:
        if not self._telemetry.enabled:
            return self._telemetry.span(name)
        parent = traceparent_of(context.invocation_metadata())
        return self._telemetry.span(name, parent=parent, kind=SpanKind.SERVER)

    def _origin(self, request: Any, context: Any) -> Origin:
        return Origin(self._caller_of(context), priority_of(request.priority))

    def _admitted(self, origin: Origin, hidden_TD: torch.Tensor) -> AbstractContextManager[None]:
        if self._in_flight is None:
            return nullcontext()
        return self._in_flight.admit(origin.caller, hidden_TD.nbytes)

    def _check_model(self, name: str) -> None:
        if name not in ("", self._model.name):
            raise UnknownModel(
                f"model {name!r}: this router serves {self._model.name!r}", model=name
            )

    def _hidden(self, layer: int, message: Any) -> torch.Tensor:
        hidden_TD = aligned(from_proto(message, "hidden"))
        check_hidden(layer, hidden_TD, self._model.num_experts)
        if hidden_TD.dtype != self._model.dtype:
            expected = f"{dtype_name(self._model.dtype)}, the model's"
            raise InvalidInput.of(
                "hidden.dtype", expected=expected, got=dtype_name(hidden_TD.dtype)
            )
        if hidden_TD.shape[1] != self._model.hidden_size:
            expected = f"[T, {self._model.hidden_size}]"
            raise InvalidInput.of("hidden.shape", expected=expected, got=list(hidden_TD.shape))
        if self._reject_nonfinite:
            check_finite(hidden_TD, "hidden")
        return hidden_TD

    def _weights(self, message: Any) -> torch.Tensor:
        weights_TK = from_proto(message, "weights")
        if self._reject_nonfinite:
            check_finite(weights_TK, "weights")
        return weights_TK

    def _mode(self, layer: int, combine: int) -> CombineMode:
        if combine == router_pb2.COMBINE_UNSPECIFIED:
            return self._model.combine_mode(layer)
        if combine not in COMBINE_MODES:
            known = ", ".join(router_pb2.Combine.keys())
            raise InvalidInput.of("combine", expected=f"one of {known}", got=combine)
        return COMBINE_MODES[combine]

    def _timeout_s(self, context: Any) -> float:
        remaining_s: float | None = context.time_remaining()
        return self._call_timeout_s if remaining_s is None else remaining_s


def _forward_response(answer: Answer, return_routing: bool) -> router_pb2.ForwardResponse:
    response = router_pb2.ForwardResponse(
        hidden=to_proto(answer.hidden_TD), degraded_mass=answer.degraded_mass_T.tolist()
    )
    if return_routing:
        response.experts.CopyFrom(to_proto(answer.experts_TK))
        response.weights.CopyFrom(to_proto(answer.weights_TK))
    return response
