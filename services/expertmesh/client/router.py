"""A blocking client of RouterService, usable as the ExpertCaller of a model.

T tokens, D hidden size, K experts per token.
"""

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import torch

from expertmesh.client.failures import error_of
from expertmesh.client.generate import call_metadata
from expertmesh.client.retries import Patience
from expertmesh.runtime.channels import connect_blocking
from expertmesh.runtime.missing_experts import DegradedMass
from expertmesh.runtime.missing_experts import to_proto as missing_to_proto
from expertmesh.runtime.security.access import PLAIN, Access
from expertmesh.runtime.tensors import from_proto, to_proto
from expertmesh.v1 import priority_pb2, router_pb2, router_pb2_grpc


@dataclass(frozen=True)
class Forwarded:
    """What `RouterClient.forward` returns."""

    hidden_TD: torch.Tensor
    experts_TK: torch.Tensor
    """-1 in the place of an expert that was missing and has no substitute."""
    weights_TK: torch.Tensor
    given_up_mass: list[float]
    """Share of the gate's choice's mass that each token lost; empty if the selection was exact."""
    degraded_mass: list[float]
    """Share of each token's weights that was for missing experts; 0 if it is exact."""


class RouterClient:
    """Calls one router.

    Args:
        target: "host:port".
        model: name of the model; "" is the only one served.
        timeout_s: for each call, tries and pauses included.
        missing_experts: "strict", "substitute" (`forward` only) or "renormalise"; None: as the
            router is configured.
        access: certificates and token; the default is plaintext without a token.
        retries: how often `dispatch` and `forward` try again what can succeed later (a full mesh, a
            replica that has gone), when the mesh says so.
        priority: of `dispatch` and `forward`.

    Raises:
        InvalidInput: there is no such policy.
    """

    def __init__(
        self,
        target: str,
        model: str = "",
        timeout_s: float = 60.0,
        missing_experts: str | None = None,
        access: Access = PLAIN,
        *,
        retries: int = 0,
        priority: int = priority_pb2.PRIORITY_INTERACTIVE,
    ) -> None:
        self._missing_experts = missing_to_proto(missing_experts)
        self.degraded = DegradedMass()
        """What missing experts have cost, over all tokens of all calls; a new one starts afresh."""
        self._access = access
        self._channel = connect_blocking(target, access)
        self._stub = router_pb2_grpc.RouterServiceStub(self._channel)
        self._model = model
        self._timeout_s = timeout_s
        self._retries = retries
        self._priority = priority_pb2.Priority.ValueType(priority)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _call(self) -> dict[str, Any]:
        return {"timeout": self._timeout_s, "metadata": call_metadata(self._access)}

    def dispatch(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        experts_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        combine: int = router_pb2.COMBINE_UNSPECIFIED,
    ) -> torch.Tensor:
        """Rows already routed: [T, D] weighted sum over each token's experts, on the same device.

        Raises:
            ExpertMeshError: as the router answered.
        """
        request = router_pb2.DispatchRequest(
            model=self._model,
            layer=layer,
            hidden=to_proto(hidden_TD),
            experts=to_proto(experts_TK),
            weights=to_proto(weights_TK),
            combine=router_pb2.Combine.ValueType(combine),
            missing_experts=self._missing_experts,
            priority=self._priority,
        )
        reply = self._tried(self._stub.Dispatch, request)
        self.degraded.add(reply.degraded_mass)
        # cloned: what a model computes with must be writable
        return from_proto(reply.hidden, "hidden").clone().to(hidden_TD.device)

    def forward(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        selection: router_pb2.SelectionOptions | None = None,
    ) -> Forwarded:
        """The router owns the gate: hidden states in, combined experts and the routing back.

        Args:
            selection: how far the experts may be from the gate's choice; None: as configured.

        Raises:
            ExpertMeshError: as the router answered.
        """
        request = router_pb2.ForwardRequest(
            model=self._model,
            layer=layer,
            hidden=to_proto(hidden_TD),
            return_routing=True,
            selection=selection,
            missing_experts=self._missing_experts,
            priority=self._priority,
        )
        reply = self._tried(self._stub.Forward, request)
        self.degraded.add(reply.degraded_mass)
        return Forwarded(
            from_proto(reply.hidden, "hidden").clone(),
            from_proto(reply.experts, "experts").clone(),
            from_proto(reply.weights, "weights").clone(),
            list(reply.given_up_mass),
            list(reply.degraded_mass),
        )

    def _tried(self, send: Any, request: Any) -> Any:
        """The reply, perhaps not of the first try."""
        patience = Patience(self._retries, self._timeout_s)
        while True:
            try:
                return send(
                    request, timeout=patience.left_s(), metadata=call_metadata(self._access)
                )
            except grpc.RpcError as failure:
                error = error_of(failure)
            time.sleep(patience.pause_s(error))

    def explain(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        selection: router_pb2.SelectionOptions | None = None,
    ) -> router_pb2.ExplainResponse:
        """Why a call would go where it goes: experts and replicas considered, with their reasons.

        Args:
            hidden_TD: at most 16 tokens.
            selection: as for `forward`.

        Raises:
            ExpertMeshError: as the router answered.
        """
        request = router_pb2.ExplainRequest(
            model=self._model, layer=layer, hidden=to_proto(hidden_TD), selection=selection
        )
        try:
            return self._stub.Explain(request, **self._call())
        except grpc.RpcError as failure:
            raise error_of(failure) from None

    def models(self) -> list[router_pb2.ModelInfo]:
        """The models the router serves."""
        try:
            reply = self._stub.ListModels(router_pb2.ListModelsRequest(), **self._call())
        except grpc.RpcError as failure:
            raise error_of(failure) from None
        return list(reply.models)
