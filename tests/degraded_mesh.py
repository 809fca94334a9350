"""A mesh whose experts can be killed, and by hand what calls without them should give.

T tokens, D hidden size, K experts per token.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.mesh import Mesh, Router
from tests.packing import random_hidden
from tests.reference_experts import load_model
from tests.router_caller import Reference, Routed, RouterCaller, dispatch_request

from expertmesh.experts.replica import Replica
from expertmesh.router.gate import Scored, score
from expertmesh.runtime.tensors import to_proto
from expertmesh.v1 import router_pb2

TOKENS, LAYER = 24, 1
RENORMALISE = router_pb2.MISSING_EXPERTS_RENORMALISE
SUBSTITUTE = router_pb2.MISSING_EXPERTS_SUBSTITUTE
STRICT = router_pb2.MISSING_EXPERTS_STRICT
DEADLINE_S = 5.0


@dataclass(frozen=True)
class Ready:
    """A mesh of four groups with one copy each, two experts in each group."""

    path: Path
    mesh: Mesh
    replicas: dict[str, Replica]
    router: Router
    caller: RouterCaller

    def scored(self, hidden_TD: torch.Tensor) -> Scored:
        """The gate's opinion, by the router's own code, which other tests compare."""
        gate = self.router.model.gate(LAYER)
        return score(gate.spec, hidden_TD, gate.weights)

    def choice(self, hidden_TD: torch.Tensor) -> Routed:
        """What the gate chooses with all experts there."""
        scored = self.scored(hidden_TD)
        experts_TK = scored.top(scored.spec.top_k)
        return Routed(experts_TK, scored.weights(experts_TK))

    async def forward(self, hidden_TD: torch.Tensor, policy: int) -> router_pb2.ForwardResponse:
        request = router_pb2.ForwardRequest(
            layer=LAYER,
            hidden=to_proto(hidden_TD),
            return_routing=True,
            missing_experts=router_pb2.MissingExperts.ValueType(policy),
        )
        response: router_pb2.ForwardResponse
        response = await self.caller.router.Forward(request, timeout=DEADLINE_S)
        return response

    async def dispatch(
        self, hidden_TD: torch.Tensor, routing: Routed, policy: int
    ) -> router_pb2.DispatchResponse:
        request = dispatch_request(LAYER, hidden_TD, routing)
        request.missing_experts = router_pb2.MissingExperts.ValueType(policy)
        response: router_pb2.DispatchResponse
        response = await self.caller.router.Dispatch(request, timeout=DEADLINE_S)
        return response


@asynccontextmanager
async def ready(
    mesh: Mesh, path: Path, router_options: dict[str, Any] | None = None, **args: Any
) -> AsyncIterator[Ready]:
    replicas = await mesh.replicas(path, 4, **args)
    router = await mesh.router(path, **(router_options or {}))
    async with RouterCaller(router.target) as caller:
        yield Ready(path, mesh, replicas, router, caller)


def hidden_for(own: Ready, dead: set[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Tokens some of whose experts are in `dead`, but not all of any."""
    many_TD = random_hidden(200, dtype=dtype)
    gone_TK = torch.isin(own.choice(many_TD).experts_TK, torch.tensor(sorted(dead)))
    kept_TD = many_TD[~gone_TK.all(1)][:TOKENS].clone()
    assert (
        int(torch.isin(own.choice(kept_TD).experts_TK, torch.tensor(sorted(dead))).any(1).sum()) > 3
    )
    return kept_TD


def reference(own: Ready, hidden_TD: torch.Tensor, routing: Routed) -> torch.Tensor:
    """transformers' experts, all alive there, on a routing of the test's own."""
    full = Reference(load_model(own.path, hidden_TD.dtype))
    return full.combined(LAYER, hidden_TD, routing).view_as(hidden_TD)


def reference_apart(
    own: Ready, hidden_TD: torch.Tensor, asked: Routed, used: Routed, dead: set[int]
) -> torch.Tensor:
    """transformers' experts on what was asked for, and apart from it on the rows of substitutes;
    the sum in slot order."""
    full = Reference(load_model(own.path, hidden_TD.dtype))
    slots = []
    for slot in range(asked.experts_TK.shape[1]):
        alone_TK = torch.zeros_like(asked.weights_TK)
        alone_TK[:, slot] = 1.0  # so that the sum is this slot
        slots.append(full.combined(LAYER, hidden_TD, Routed(asked.experts_TK, alone_TK)))
    outputs_TKD = torch.stack(slots, dim=1)
    gone_TK = torch.isin(asked.experts_TK, torch.tensor(sorted(dead)))
    if gone_TK.any():
        experts_R1 = used.experts_TK[gone_TK].unsqueeze(1)
        ones_R1 = torch.ones_like(experts_R1, dtype=asked.weights_TK.dtype)
        rows_RD = hidden_TD[gone_TK.nonzero(as_tuple=True)[0]]
        outputs_TKD[gone_TK] = full.combined(LAYER, rows_RD, Routed(experts_R1, ones_R1))
    weighted_TKD = outputs_TKD.to(used.weights_TK.dtype) * used.weights_TK.unsqueeze(-1)
    return weighted_TKD.sum(1).to(hidden_TD.dtype)


def renormalised_by_hand(routing: Routed, dead: set[int]) -> tuple[torch.Tensor, list[float]]:
    """(weights, degraded mass), token by token in Python."""
    weights_TK, masses = routing.weights_TK.clone(), []
    for token, ids in enumerate(routing.experts_TK.tolist()):
        own = routing.weights_TK[token].double().tolist()
        gone = [weight for expert, weight in zip(ids, own, strict=True) if expert in dead]
        masses.append(sum(gone) / sum(own))
        if gone:
            factor = sum(own) / (sum(own) - sum(gone))
            scaled = [0.0 if e in dead else w * factor for e, w in zip(ids, own, strict=True)]
            weights_TK[token] = torch.tensor(scaled, dtype=torch.float64).to(weights_TK.dtype)
    return weights_TK, masses
