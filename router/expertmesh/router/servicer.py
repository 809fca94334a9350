"""RouterService: the router core for callers with their own hidden states.

T tokens, D hidden size, K experts per token, R rows (T * K), P padded rows.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from opentelemetry.trace import Span, SpanKind

from expertmesh.router.combine import CombineMode
from expertmesh.router.core import RouterCore
from expertmesh.router.gate import Routing, route
from expertmesh.router.served_model import ServedModel
from expertmesh.router.validate import check_finite, check_hidden
from expertmesh.runtime.dense_rows import pad_to_dense
from expertmesh.runtime.errors import InvalidInput, UnknownModel
from expertmesh.runtime.telemetry import Telemetry, traceparent_of
from expertmesh.runtime.tensors import aligned, dtype_name, from_proto, to_proto
from expertmesh.v1 import router_pb2, router_pb2_grpc

SERVICE = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name

COMBINE_MODES: dict[int, CombineMode] = {
    router_pb2.COMBINE_SLOT_SUM: "slot_sum",
    router_pb2.COMBINE_EAGER: "eager",
}


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Serves one model over a router core.

    Args:
        call_timeout_s: for callers that give no deadline.
        reject_nonfinite: refuse hidden states with NaN or infinity.
    """

    def __init__(
        self,
        model: ServedModel,
        core: RouterCore,
        telemetry: Telemetry,
        *,
        call_timeout_s: float,
        reject_nonfinite: bool = False,
    ) -> None:
        self._model = model
        self._core = core
        self._telemetry = telemetry
        self._call_timeout_s = call_timeout_s
        self._reject_nonfinite = reject_nonfinite

    async def Dispatch(
        self, request: router_pb2.DispatchRequest, context: Any
    ) -> router_pb2.DispatchResponse:
        """Rows already routed."""
        with self._span(context, "router.Dispatch"):
            self._check_model(request.model)
            hidden_TD = self._hidden(request.layer, request.hidden)
            combined_TD = await self._core.dispatch(
                request.layer,
                hidden_TD,
                from_proto(request.experts, "experts"),
                self._weights(request.weights),
                self._mode(request.layer, request.combine),
                self._timeout_s(context),
            )
            return router_pb2.DispatchResponse(hidden=to_proto(combined_TD))

    async def Forward(
        self, request: router_pb2.ForwardRequest, context: Any
    ) -> router_pb2.ForwardResponse:
        """The router owns the gate."""
        with self._span(context, "router.Forward"):
            self._check_model(request.model)
            hidden_TD = self._hidden(request.layer, request.hidden)
            gate = self._model.gate(request.layer)
            with self._telemetry.span("router.gate"), torch.inference_mode():
                routing = route(gate.spec, hidden_TD, gate.weights)
            send = self._send_scaled if gate.spec.apply == "before" else self._send
            combined_TD = await send(
                request.layer, hidden_TD, routing, gate.spec.combine, self._timeout_s(context)
            )
            return _forward_response(combined_TD, routing, request.return_routing)

    async def ListModels(
        self, request: router_pb2.ListModelsRequest, context: Any
    ) -> router_pb2.ListModelsResponse:
        """The one model served."""
        return router_pb2.ListModelsResponse(models=[self._model.info()])

    async def _send(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        routing: Routing,
        mode: CombineMode,
        timeout_s: float,
    ) -> torch.Tensor:
        return await self._core.dispatch(
            layer, hidden_TD, routing.experts_TK, routing.weights_TK, mode, timeout_s
        )

    async def _send_scaled(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        routing: Routing,
        mode: CombineMode,
        timeout_s: float,
    ) -> torch.Tensor:
        """Weights scale the experts' inputs (llama4): each slot is a row of its own."""
        num_tokens, top_k = routing.experts_TK.shape
        rows_RD = (hidden_TD.unsqueeze(1) * routing.weights_TK.unsqueeze(-1)).flatten(0, 1)
        experts_R = routing.experts_TK.reshape(-1)
        padded_PD, experts_P = pad_to_dense(rows_RD, experts_R, num_tokens)
        ones_P1 = torch.ones_like(experts_P, dtype=rows_RD.dtype).unsqueeze(1)
        out_PD = await self._core.dispatch(
            layer, padded_PD, experts_P.unsqueeze(1), ones_P1, mode, timeout_s
        )
        return out_PD[: len(rows_RD)].view(num_tokens, top_k, -1).sum(dim=1)

    def _span(self, context: Any, name: str) -> AbstractContextManager[Span]:
        if not self._telemetry.enabled:
            return self._telemetry.span(name)
        parent = traceparent_of(context.invocation_metadata())
        return self._telemetry.span(name, parent=parent, kind=SpanKind.SERVER)

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


def _forward_response(
    combined_TD: torch.Tensor, routing: Routing, return_routing: bool
) -> router_pb2.ForwardResponse:
    response = router_pb2.ForwardResponse(hidden=to_proto(combined_TD))
    if return_routing:
        response.experts.CopyFrom(to_proto(routing.experts_TK))
        response.weights.CopyFrom(to_proto(routing.weights_TK))
    return response
