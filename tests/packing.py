"""What a caller of ExpertService writes and reads. T tokens, R rows, D hidden size."""

from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import torch

from expertmesh.client.failures import error_of
from expertmesh.runtime.error_status import from_status
from expertmesh.runtime.errors import ExpertMeshError
from expertmesh.runtime.tensors import from_bytes, to_bytes, torch_dtype, wire_dtype
from expertmesh.v1 import expert_pb2, expert_pb2_grpc

HIDDEN_SIZE = 64


@dataclass(frozen=True)
class Packed:
    """A request with one row per token, and the way back from its rows to the tokens."""

    request: expert_pb2.ComputeRequest
    order_R: torch.Tensor

    def unpack(self, response: expert_pb2.ComputeResponse) -> torch.Tensor:
        """The response's rows [T, D] in the order of the tokens."""
        shape = (len(self.order_R), response.hidden_size)
        rows_RD = from_bytes(response.rows, torch_dtype(response.dtype), shape)
        out_TD = torch.empty_like(rows_RD)
        out_TD[self.order_R] = rows_RD
        return out_TD


def pack(hidden_TD: torch.Tensor, experts_T: torch.Tensor, **fields: Any) -> Packed:
    """Each token through one expert, rows in the order in which transformers sorts them."""
    order_R = torch.sort(experts_T).indices
    experts, counts = torch.unique_consecutive(experts_T[order_R], return_counts=True)
    request = expert_pb2.ComputeRequest(
        experts=experts.tolist(),
        rows_per_expert=counts.tolist(),
        dtype=wire_dtype(hidden_TD.dtype),
        hidden_size=hidden_TD.shape[1],
        rows=bytes(to_bytes(hidden_TD[order_R])),
        **fields,
    )
    return Packed(request, order_R)


def random_hidden(
    num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[T, 64]"""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, HIDDEN_SIZE, generator=random).to(dtype)


def random_request(
    seed: int,
    num_tokens: int,
    layer: int = 0,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> Packed:
    """Rows for some of the experts 0 to 7."""
    random = torch.Generator().manual_seed(seed)
    experts_T = torch.randint(8, (num_tokens,), generator=random)
    return pack(random_hidden(num_tokens, seed, dtype), experts_T, layer=layer, **fields)


class ExpertCaller:
    """A stock client of one replica with one open stream."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self.stub = expert_pb2_grpc.ExpertServiceStub(self._channel)
        self.stream: Any = self.stub.ComputeStream()

    async def __aenter__(self) -> "ExpertCaller":
        return self

    async def __aexit__(self, *raised: object) -> None:
        self.stream.cancel()
        await self._channel.close()

    def raw_stream(self) -> Any:
        """A second stream, of bytes."""
        return self._channel.stream_stream("/expertmesh.v1.ExpertService/ComputeStream")()

    async def ask(self, request: expert_pb2.ComputeRequest) -> expert_pb2.ComputeResponse:
        """One request on the stream and the next answer."""
        await self.stream.write(request)
        answer: expert_pb2.ComputeResponse = await self.stream.read()
        assert answer.id == request.id
        return answer

    async def refused(self, request: expert_pb2.ComputeRequest) -> ExpertMeshError:
        """The error that one request on the stream is answered with."""
        answer = await self.ask(request)
        assert answer.HasField("error")
        assert not answer.rows
        return from_status(answer.error)

    async def refused_unary(
        self, request: expert_pb2.ComputeRequest, timeout_s: float = 10.0
    ) -> ExpertMeshError:
        """The error that a unary call is answered with."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.stub.Compute(request, timeout=timeout_s)
        error = error_of(caught.value)
        assert caught.value.code() == error.code
        return error
