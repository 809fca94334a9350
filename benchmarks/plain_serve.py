"""An expert group as a user of Ray Serve would write it, following Serve's documentation."""

import os

import torch

from expertmesh.experts.ffn import ExpertFFN


class PlainGroup:
    """Some experts of one layer behind a DeploymentHandle."""

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

    async def pid(self) -> int:
        """Of the replica's process."""
        return os.getpid()
