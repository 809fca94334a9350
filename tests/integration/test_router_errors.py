"""Bad calls of RouterService: each has its code and reason, and the next good one succeeds."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.mesh import MakeCheckpoint, Mesh
from tests.packing import HIDDEN_SIZE, random_hidden
from tests.reference_experts import other_checkpoint
from tests.router_caller import Routed, RouterCaller, dispatch_request, random_routing, refusal

from expertmesh.runtime.errors import (
    ExpertMeshError,
    InvalidInput,
    MessageTooLarge,
    NonFiniteInput,
    UnknownExpert,
    UnknownModel,
    UnsupportedCheckpoint,
)
from expertmesh.runtime.tensors import to_proto
from expertmesh.v1 import router_pb2

NUM_TOKENS = 3
Change = Callable[[Any], None]


class Wrong(NamedTuple):
    """What to change in a good request, and what it must be answered with."""

    change: Change
    error: type[ExpertMeshError]
    text: str


def put(**fields: Any) -> Change:
    def change(request: Any) -> None:
        for name, value in fields.items():
            setattr(request, name, value)

    return change


def replace(field: str, tensor: torch.Tensor) -> Change:
    return lambda request: getattr(request, field).CopyFrom(to_proto(tensor))


def with_value(field: str, value: float) -> Change:
    """A float32 tensor whose last element is `value`."""

    def change(request: Any) -> None:
        tensor = getattr(request, field)
        tensor.data = tensor.data[:-4] + torch.tensor(value).numpy().tobytes()

    return change


def shaped(field: str, *shape: int) -> Change:
    """Another shape, no data."""

    def change(request: Any) -> None:
        tensor = getattr(request, field)
        tensor.shape[:], tensor.data = shape, b""

    return change


def clear(field: str) -> Change:
    return lambda request: request.ClearField(field)


def set_dtype(field: str, number: int) -> Change:
    return lambda request: setattr(getattr(request, field), "dtype", number)


def ids(*experts: int) -> Change:
    """Of the last token."""
    return replace("experts", torch.tensor([[0, 1], [1, 2], list(experts)]))


HIDDEN = {
    "model": Wrong(put(model="other"), UnknownModel, "model 'other': .*'tiny'"),
    "layer": Wrong(put(layer=2), UnknownExpert, "layer 2: .*0, 1"),
    "no hidden": Wrong(clear("hidden"), InvalidInput, "hidden.dtype: .*DType 0"),
    "future dtype": Wrong(set_dtype("hidden", 99), InvalidInput, "hidden.dtype: .*DType 99"),
    "half": Wrong(
        replace("hidden", torch.zeros(3, HIDDEN_SIZE).half()),
        InvalidInput,
        "hidden.dtype: expected float32.*got float16",
    ),
    "integers": Wrong(
        replace("hidden", torch.zeros(3, HIDDEN_SIZE).int()), InvalidInput, "hidden.dtype: .*int32"
    ),
    "width": Wrong(
        replace("hidden", torch.zeros(3, 32)), InvalidInput, r"hidden.shape: .*64.*got \[3, 32\]"
    ),
    "one dimension": Wrong(
        replace("hidden", torch.zeros(HIDDEN_SIZE)), InvalidInput, r"hidden.shape: .*\[64\]"
    ),
    "no tokens": Wrong(shaped("hidden", 0, HIDDEN_SIZE), InvalidInput, r"hidden.shape: .*\[0, 64"),
    "no data": Wrong(shaped("hidden", 3, HIDDEN_SIZE), InvalidInput, "hidden.data: .*768 bytes"),
    "no tensor has it": Wrong(
        shaped("hidden", 0, 2**32 - 1, 2**32 - 1, 2**32 - 1), InvalidInput, "hidden"
    ),
    "too large for any memory": Wrong(
        shaped("hidden", 2**32 - 1, 2**32 - 1), InvalidInput, "hidden.data: expected .* got 0 bytes"
    ),
    "NaN": Wrong(with_value("hidden", torch.nan), NonFiniteInput, "hidden: row 2"),
    "infinity": Wrong(with_value("hidden", torch.inf), NonFiniteInput, "hidden: row 2"),
}
ROUTING = {
    "no experts": Wrong(clear("experts"), InvalidInput, "experts.dtype"),
    "experts of other tokens": Wrong(
        replace("experts", torch.zeros(2, 2).long()), InvalidInput, r"experts.shape: .*\[3, K\]"
    ),
    "flat experts": Wrong(replace("experts", torch.zeros(3).long()), InvalidInput, "experts.shape"),
    "K = 0": Wrong(shaped("experts", 3, 0), InvalidInput, "experts.shape: expected 1 to 16"),
    "K = 17": Wrong(replace("experts", torch.arange(51).view(3, 17)), InvalidInput, "got 17"),
    "experts are floats": Wrong(
        replace("experts", torch.zeros(3, 2)), InvalidInput, "experts.dtype: .*got float32"
    ),
    "expert": Wrong(ids(0, 8), UnknownExpert, "layer 0, expert 8: .*0 to 7"),
    "negative expert": Wrong(ids(-1, 0), UnknownExpert, "layer 0, expert -1"),
    "no weights": Wrong(clear("weights"), InvalidInput, "weights.dtype"),
    "weights of other slots": Wrong(
        replace("weights", torch.ones(3, 1)), InvalidInput, r"weights.shape: .*\[3, 2\]"
    ),
    "weights are integers": Wrong(
        replace("weights", torch.ones(3, 2).int()), InvalidInput, "weights.dtype: .*got int32"
    ),
    "weights cut short": Wrong(
        lambda request: setattr(request.weights, "data", request.weights.data[:-1]),
        InvalidInput,
        "weights.data: expected 24 bytes.*got 23",
    ),
    "NaN weight": Wrong(with_value("weights", torch.nan), NonFiniteInput, "weights: row 2"),
    "a scalar NaN for weights": Wrong(
        replace("weights", torch.tensor(torch.nan)), NonFiniteInput, "weights: row 0"
    ),
    "combine": Wrong(put(combine=7), InvalidInput, "combine: .*got 7"),
}
CASES = [("Dispatch", name, wrong) for name, wrong in (HIDDEN | ROUTING).items()] + [
    ("Forward", name, wrong) for name, wrong in HIDDEN.items()
]


def good(method: str) -> Any:
    hidden_TD, routing = random_hidden(NUM_TOKENS), random_routing(NUM_TOKENS, 2)
    if method == "Dispatch":
        return dispatch_request(0, hidden_TD, routing)
    return router_pb2.ForwardRequest(layer=0, hidden=to_proto(hidden_TD))


async def test_a_bad_call_costs_only_itself(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("mixtral")
    replicas = await mesh.replicas(path, 2)
    router = await mesh.router(path, reject_nonfinite=True)
    async with RouterCaller(router.target) as caller:
        for method, name, wrong in CASES:
            call: Any = getattr(caller.router, method)
            expected = (await call(good(method))).hidden
            done_rows = [replica.load().done_rows for replica in replicas.values()]
            bad = good(method)
            wrong.change(bad)
            error = await refusal(call(bad))
            assert type(error) is wrong.error, (method, name, error)
            assert re.search(wrong.text, error.message), (method, name, error.message)
            asked = [replica.load().done_rows for replica in replicas.values()]
            assert asked == done_rows, (method, name, "nothing wrong reaches an expert")
            assert (await call(good(method))).hidden == expected, (method, name)


async def test_nan_is_computed_unless_it_is_to_be_rejected(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    await mesh.replicas(path, 2)
    router = await mesh.router(path)
    hidden_TD = random_hidden(3)
    hidden_TD[1, 5] = torch.nan
    async with RouterCaller(router.target) as caller:
        out_TD = await caller.dispatch(0, hidden_TD, random_routing(3, 2))
        assert out_TD.isnan().any(dim=1).tolist() == [False, True, False]


async def test_a_message_above_the_limit(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("mixtral")
    limit = 1 << 14
    await mesh.replicas(path, 2, max_message_bytes=limit)
    router = await mesh.router(path, max_message_bytes=limit)
    async with RouterCaller(router.target) as caller:
        too_large = random_hidden(limit // HIDDEN_SIZE // 4 + 1)
        assert type(await refusal(caller.forward(0, too_large))) is MessageTooLarge
        await caller.forward(0, random_hidden(3))
        # the call fits, but all its rows would go to one replica, twice
        fits, both = random_hidden(45), Routed(torch.tensor([[0, 1]] * 45), torch.ones(45, 2))
        error = await refusal(caller.dispatch(0, fits, both))
        assert type(error) is MessageTooLarge
        assert error.fields["max_message_bytes"] == str(limit)
        await caller.dispatch(0, fits, Routed(both.experts_TK[:, :1], both.weights_TK[:, :1]))


async def test_what_may_be_asked_may_be_answered(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    """The answer to the longest request allowed is some bytes longer."""
    path = checkpoint("mixtral")
    num_rows = 16
    header_bytes = 34  # of the request to the replica
    limit = num_rows * HIDDEN_SIZE * 4 + header_bytes
    await mesh.replica(path, max_message_bytes=limit)
    router = await mesh.router(path, max_message_bytes=limit)
    narrower = await mesh.router(path, max_message_bytes=limit - 1)
    hidden_TD = random_hidden(num_rows)
    experts_T1, weights_T1 = torch.zeros(num_rows, 1).long(), torch.ones(num_rows, 1)
    await router.core.dispatch(0, hidden_TD, experts_T1, weights_T1, "slot_sum")
    with pytest.raises(MessageTooLarge):
        await narrower.core.dispatch(0, hidden_TD, experts_T1, weights_T1, "slot_sum")


async def test_forward_of_a_family_that_needs_its_own_router_code(
    mesh: Mesh, tmp_path: Path
) -> None:
    router = await mesh.router(other_checkpoint("jetmoe", tmp_path), complete=False)
    layer = next(iter(router.model.num_experts))
    hidden_TD = random_hidden(3)
    async with RouterCaller(router.target) as caller:
        error = await refusal(caller.forward(layer, hidden_TD))
        assert type(error) is UnsupportedCheckpoint
        assert "Dispatch works" in error.message
        [model] = (await caller.router.ListModels(router_pb2.ListModelsRequest())).models
        assert model.forward_unavailable == error.message


async def test_a_dense_layer_has_no_experts(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("deepseek_v3")
    await mesh.replicas(path, 2)
    router = await mesh.router(path)
    async with RouterCaller(router.target) as caller:
        error = await refusal(caller.forward(0, random_hidden(3)))
        assert type(error) is UnknownExpert
        assert "layer 0: the model's MoE layers are 1, 2" in error.message
        await caller.forward(1, random_hidden(3))
