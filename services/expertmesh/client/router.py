"""A blocking client of RouterService, usable as the ExpertCaller of a model.

T tokens, D hidden size, K experts per token.
"""

from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc
import torch

from expertmesh.client.failures import error_of
from expertmesh.client.generate import trace_metadata
from expertmesh.runtime.channels import channel_options
from expertmesh.runtime.tensors import from_proto, to_proto
from expertmesh.v1 import router_pb2, router_pb2_grpc


@dataclass(frozen=True)
class Forwarded:
    """What `RouterClient.forward` returns."""

    hidden_TD: torch.Tensor
    experts_TK: torch.Tensor
    weights_TK: torch.Tensor


class RouterClient:
    """Calls one router.

    Args:
        target: "host:port".
        model: name of the model; "" is the only one served.
        timeout_s: for each call.
    """

    def __init__(self, target: str, model: str = "", timeout_s: float = 60.0) -> None:
        self._channel = grpc.insecure_channel(target, options=channel_options())
        self._stub = router_pb2_grpc.RouterServiceStub(self._channel)
        self._model = model
        self._timeout_s = timeout_s

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
        )
        try:
            reply = self._stub.Dispatch(request, timeout=self._timeout_s, metadata=trace_metadata())
        except grpc.RpcError as failure:
            raise error_of(failure) from None
        # cloned: what a model computes with must be writable
        return from_proto(reply.hidden, "hidden").clone().to(hidden_TD.device)

    def forward(self, layer: int, hidden_TD: torch.Tensor) -> Forwarded:
        """The router owns the gate: hidden states in, combined experts and the routing back.

        Raises:
            ExpertMeshError: as the router answered.
        """
        request = router_pb2.ForwardRequest(
            model=self._model, layer=layer, hidden=to_proto(hidden_TD), return_routing=True
        )
        try:
            reply = self._stub.Forward(request, timeout=self._timeout_s, metadata=trace_metadata())
        except grpc.RpcError as failure:
            raise error_of(failure) from None
        return Forwarded(
            from_proto(reply.hidden, "hidden").clone(),
            from_proto(reply.experts, "experts").clone(),
            from_proto(reply.weights, "weights").clone(),
        )

    def models(self) -> list[router_pb2.ModelInfo]:
        """The models the router serves."""
        try:
            reply = self._stub.ListModels(router_pb2.ListModelsRequest(), timeout=self._timeout_s)
        except grpc.RpcError as failure:
            raise error_of(failure) from None
        return list(reply.models)
