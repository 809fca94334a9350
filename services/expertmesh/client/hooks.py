"""Remote experts for a model the user has loaded, and as transformers' `experts_implementation`."""

import sys
from types import FrameType
from typing import Any

import torch
import transformers
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from expertmesh.client.remote_experts import (
    ExpertCaller,
    is_decorated,
    layer_of,
    routing_of,
    swap_experts,
)
from expertmesh.runtime.errors import UnsupportedCheckpoint
from expertmesh.v1 import router_pb2

IMPLEMENTATION = "expertmesh"
_LAYER = "_expertmesh_layer"


def attach_caller(model: Any, caller: ExpertCaller) -> Any:
    """Replaces the experts of a loaded transformers model in place and returns the model.

    The memory of the expert weights is freed, unless something else refers to them.

    Raises:
        UnsupportedCheckpoint: the model has no experts that can be called remotely.
    """
    swap_experts(model, caller)
    return model


def register_caller(caller: ExpertCaller) -> None:
    """Makes `from_pretrained(..., experts_implementation="expertmesh")` call `caller`.

    The expert weights stay in the model, unused; `attach_caller` frees them, `load_skeleton` never
    reads them. Works for the classes transformers decorates with `@use_experts_implementation` (not
    dbrx and llama4). A second call replaces the caller of the first, for all models.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        experts: nn.Module, hidden_TD: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        experts_TK, weights_TK = routing_of(*args, **kwargs)
        layer = _layer(experts)
        return caller.dispatch(
            layer, hidden_TD, experts_TK, weights_TK, router_pb2.COMBINE_SLOT_SUM
        )

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)


def _layer(experts: nn.Module) -> int:
    """The layer these experts belong to, found at their first call."""
    layer: int | None = getattr(experts, _LAYER, None)
    if layer is None:
        _number_experts(_running_model(experts))
        layer = int(getattr(experts, _LAYER))
    return layer


def _number_experts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if is_decorated(module):
            setattr(module, _LAYER, layer_of(name))


def _running_model(experts: nn.Module) -> Any:
    """The model whose forward is calling `experts`: transformers passes the experts module only,
    and modules do not know their parents, but the model's forward is on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, transformers.PreTrainedModel) and experts in owner.modules():
            return owner
        frame = frame.f_back
    raise UnsupportedCheckpoint(
        f"cannot tell which layer a {type(experts).__name__} belongs to when it is called outside "
        "its model; use expertmesh.client.attach(model, target) instead"
    )
