"""A client of RouterService and ControlService, and what transformers' own block computes.

T tokens, D hidden size, E experts, K experts per token.
"""

from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import torch
from tests.reference_experts import expert_modules

from expertmesh.client.failures import error_of
from expertmesh.runtime.errors import ExpertMeshError
from expertmesh.runtime.tensors import from_proto, to_proto
from expertmesh.v1 import (
    control_pb2,
    control_pb2_grpc,
    priority_pb2,
    router_pb2,
    router_pb2_grpc,
)


@dataclass(frozen=True)
class Routed:
    """One pass of a layer: what its gate chose and what its routed experts gave."""

    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    hidden_TD: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class Reference:
    """The MoE blocks of a complete transformers model."""

    def __init__(self, model: Any) -> None:
        self.modules = expert_modules(model)
        """Layer -> its experts module."""
        names = {module: name for name, module in model.named_modules()}
        self._blocks = {
            layer: model.get_submodule(names[module].rpartition(".")[0])
            for layer, module in self.modules.items()
        }

    def routed(self, layer: int, hidden_TD: torch.Tensor) -> Routed:
        """The layer's routing and the output of its routed experts, by running its whole block."""
        seen: list[tuple[list[Any], torch.Tensor]] = []

        def on_experts(module: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
            seen.append(([*args, *kwargs.values()], out))

        hook = self.modules[layer].register_forward_hook(on_experts, with_kwargs=True)
        with torch.inference_mode():
            self._blocks[layer](hidden_TD.unsqueeze(0))
        hook.remove()
        [(given, out)] = seen
        if len(given) == 1:  # llama4 sends every token through every expert
            out_TD = out.view(-1, *hidden_TD.shape).sum(0)
            return Routed(torch.empty(0), torch.empty(0), out_TD)
        return Routed(given[1], given[2], out.view_as(hidden_TD))

    def combined(self, layer: int, hidden_TD: torch.Tensor, routing: Routed) -> torch.Tensor:
        """The layer's experts on a routing of the test's own: [T, D]."""
        with torch.inference_mode():
            module = self.modules[layer]
            out_TD: torch.Tensor = module(hidden_TD, routing.experts_TK, routing.weights_TK)
        return out_TD


def random_routing(
    num_tokens: int,
    top_k: int,
    num_experts: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Routed:
    """Distinct experts per token and weights that add up to one."""
    random = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(num_tokens, num_experts, generator=random)
    weights_TK, experts_TK = scores_TE.softmax(-1).topk(top_k)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return Routed(experts_TK, weights_TK.to(dtype))


class RouterCaller:
    """An asyncio client of one router."""

    def __init__(self, target: str) -> None:
        # a connection of its own, as a caller in another process has
        alone = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(target, options=alone)
        self.router = router_pb2_grpc.RouterServiceStub(self._channel)
        self.control = control_pb2_grpc.ControlServiceStub(self._channel)

    async def __aenter__(self) -> "RouterCaller":
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._channel.close()

    async def dispatch(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        routing: Routed,
        combine: int = router_pb2.COMBINE_UNSPECIFIED,
        timeout_s: float | None = 20.0,
        priority: int = priority_pb2.PRIORITY_UNSPECIFIED,
    ) -> torch.Tensor:
        request = dispatch_request(layer, hidden_TD, routing, combine)
        request.priority = priority_pb2.Priority.ValueType(priority)
        response = await self.router.Dispatch(request, timeout=timeout_s)
        return from_proto(response.hidden, "hidden")

    async def forward(
        self, layer: int, hidden_TD: torch.Tensor, timeout_s: float | None = 20.0
    ) -> Routed:
        request = router_pb2.ForwardRequest(
            layer=layer, hidden=to_proto(hidden_TD), return_routing=True
        )
        response = await self.router.Forward(request, timeout=timeout_s)
        return Routed(
            from_proto(response.experts, "experts"),
            from_proto(response.weights, "weights"),
            from_proto(response.hidden, "hidden"),
        )

    async def snapshot(self) -> control_pb2.GetSnapshotResponse:
        return await self.control.GetSnapshot(control_pb2.GetSnapshotRequest())


def dispatch_request(
    layer: int,
    hidden_TD: torch.Tensor,
    routing: Routed,
    combine: int = router_pb2.COMBINE_UNSPECIFIED,
) -> router_pb2.DispatchRequest:
    return router_pb2.DispatchRequest(
        layer=layer,
        hidden=to_proto(hidden_TD),
        experts=to_proto(routing.experts_TK),
        weights=to_proto(routing.weights_TK),
        combine=router_pb2.Combine.ValueType(combine),
    )


async def refusal(call: Awaitable[object]) -> ExpertMeshError:
    """The typed error a call fails with; its code is the one on the wire."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = error_of(caught.value)
    assert caught.value.code() == error.code
    return error
