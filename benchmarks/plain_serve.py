"""An expert group as a user of Ray Serve would write it, following Serve's documentation."""

import os

import torch

from expertmesh.experts.ffn import ExpertFFN
from expertmesh.runtime.tensors import from_bytes, to_bytes, torch_dtype
from expertmesh.v1 import expert_pb2


class PlainGroup:
    """Some experts of one layer, for DeploymentHandles and for Serve's gRPC proxy."""

    def __init__(self, model_dir: str, experts: list[int]) -> None:
        from expertmesh.experts.expert_spec import ExpertSpec
        from expertmesh.experts.reader import ExpertReader
        from expertmesh.runtime.checkpoint import Checkpoint

        torch.set_num_threads(1)
        checkpoint = Checkpoint.open(model_dir)
        spec = ExpertSpec.from_config(checkpoint.config)
        self._ffn = ExpertFFN.load(ExpertReader(checkpoint), 0, experts, spec, torch.float32)

    async def __call__(
        self, experts: list[int], rows_per_expert: list[int], rows_RD: torch.Tensor
    ) -> torch.Tensor:
        """[R, D] of rows sorted by expert."""
        return self._ffn.forward(rows_RD, experts, rows_per_expert)

    async def Compute(self, request: expert_pb2.ComputeRequest) -> expert_pb2.ComputeResponse:
        """The same for the proxy, which calls the method that is named as the RPC."""
        experts, rows_per_expert = list(request.experts), list(request.rows_per_expert)
        shape = (sum(rows_per_expert), request.hidden_size)
        rows_RD = from_bytes(request.rows, torch_dtype(request.dtype), shape)
        outputs_RD = await self(experts, rows_per_expert, rows_RD)
        return expert_pb2.ComputeResponse(
            dtype=request.dtype,
            hidden_size=request.hidden_size,
            rows=bytes(to_bytes(outputs_RD)),
        )

    async def pid(self) -> int:
        """Of the replica's process."""
        return os.getpid()
