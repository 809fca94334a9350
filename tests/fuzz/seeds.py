"""Well-formed inputs of each target, from which mutation begins."""

import struct
from typing import Any

import jwt
import torch
from tests.checkpoints import VOCAB_SIZE
from tests.fakes import holds, replica_state

from expertmesh.runtime.errors import QueueFull
from expertmesh.runtime.tensors import to_proto
from expertmesh.v1 import control_pb2, expert_pb2, generate_pb2, router_pb2, tensor_pb2

HIDDEN_SIZE = 64


def compute_requests() -> list[bytes]:
    """To a replica that holds experts 0 to 3 of layer 0, and 1 and 5 of layer 1."""
    rows = bytes(4 * HIDDEN_SIZE)
    fields: dict[str, Any] = {"dtype": 1, "hidden_size": HIDDEN_SIZE, "model": "tiny"}
    requests = [
        expert_pb2.ComputeRequest(
            id=7, layer=0, experts=[0, 3], rows_per_expert=[1, 2], rows=rows * 3, **fields
        ),
        expert_pb2.ComputeRequest(
            layer=1, experts=[5], rows_per_expert=[1], rows=rows, timeout_ms=100, **fields
        ),
    ]
    return [request.SerializeToString() for request in requests]


def compute_responses() -> list[bytes]:
    """An answer, and an error."""
    load = control_pb2.ReplicaLoad(queued_rows=3, row_time_us=1.5, resident_bits=b"\xff")
    answer = expert_pb2.ComputeResponse(
        id=1,
        dtype=tensor_pb2.DTYPE_FLOAT32,
        hidden_size=HIDDEN_SIZE,
        load=load,
        queue_us=3,
        rows=bytes(256),
    )
    failure = expert_pb2.ComputeResponse(id=1, error=QueueFull("full", rows=3).to_status())
    return [answer.SerializeToString(), failure.SerializeToString()]


def router_requests() -> list[tuple[int, bytes]]:
    """(kind, request) for Dispatch, Forward and Explain."""
    hidden = to_proto(torch.randn(2, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)))
    experts, weights = to_proto(torch.tensor([[0, 7], [3, 1]])), to_proto(torch.ones(2, 2))
    selection = router_pb2.SelectionOptions(quality_budget=0.1, policy="budget", top_k=2)
    dispatch = router_pb2.DispatchRequest(
        model="tiny",
        hidden=hidden,
        experts=experts,
        weights=weights,
        combine=router_pb2.COMBINE_SLOT_SUM,
    )
    forward = router_pb2.ForwardRequest(hidden=hidden, return_routing=True, selection=selection)
    explain = router_pb2.ExplainRequest(hidden=hidden, layer=1, selection=selection)
    requests = (dispatch, forward, explain)
    return [(kind, request.SerializeToString()) for kind, request in enumerate(requests)]


def gateway_requests() -> list[tuple[int, bytes]]:
    """(kind, request) for Generate and Score."""
    sampling = generate_pb2.SamplingParams(
        do_sample=True, temperature=0.7, top_k=5, top_p=0.9, seed=3
    )
    text = generate_pb2.GenerateRequest(
        model="tiny", text="namespace c10 {", sampling=sampling, max_new_tokens=8, stop=["\n", "}"]
    )
    ids = generate_pb2.GenerateRequest(tokens=generate_pb2.TokenIds(ids=[1, 2, VOCAB_SIZE - 1]))
    tokens = torch.tensor([[1, 2, 3], [0, 4, 5]])
    score = generate_pb2.ScoreRequest(
        tokens=to_proto(tokens), mask=to_proto(torch.ones_like(tokens))
    )
    return [
        (0, text.SerializeToString()),
        (0, ids.SerializeToString()),
        (1, score.SerializeToString()),
    ]


def heartbeats() -> list[bytes]:
    """A replica's records."""
    own = holds({0: range(8), 1: [1, 3]})
    state = replica_state(model="tiny", holds=own, hidden_size=HIDDEN_SIZE, local_socket="x")
    state.load.CopyFrom(control_pb2.ReplicaLoad(row_time_us=2, free_bytes=1 << 30))
    state.device.CopyFrom(control_pb2.DeviceState(kind="cpu", utilisation_frac=0.5))
    gone = replica_state(lease_ms=0)
    return [state.SerializeToString(), gone.SerializeToString()]


def authorizations() -> list[bytes]:
    """Tokens of both kinds."""
    signed = jwt.encode({"sub": "a"}, "s" * 32, "HS256", headers={"kid": "k"})
    return [b"Bearer expertmesh-abc", f"Bearer {signed}".encode(), b"Basic eDp5"]


def seeds() -> dict[str, list[bytes]]:
    """By the name of the target."""
    requests, answers, records = compute_requests(), compute_responses(), heartbeats()
    routed, generated = router_requests(), gateway_requests()
    kinds = [bytes([kind]) + data for kind, data in routed]
    kinds += [bytes([3 + kind]) + data for kind, data in generated]
    hidden = to_proto(torch.randn(2, 4)).SerializeToString()
    frames = b"".join(struct.pack("<I", len(data)) + data for data in requests)
    return {
        "framed": [b"\0" + data for data in requests] + [b"\1" + data for data in answers],
        "whole": kinds,
        "tensors": [hidden],
        "records": records,
        "statuses": answers,
        "traces": [b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"],
        "frames": [frames, struct.pack("<I", 0) * 5, struct.pack("<I", 1 << 31)],
        "expert service": [bytes([way]) + data for way in range(3) for data in requests],
        "router service": [bytes([kind]) + data for kind, data in routed],
        "heartbeats": records,
        "answers": answers,
        "generate service": [bytes([kind]) + data for kind, data in generated],
        "authorization": authorizations(),
    }
