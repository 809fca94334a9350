"""The flagship: real replicas under Ray Serve, real gRPC and Unix sockets, and the bits of
transformers.

Shape suffixes: B batch, S sequence length, V vocabulary.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import FAMILIES, VOCAB_SIZE, tiny_checkpoint
from tests.e2e.cluster import Cluster
from transformers import AutoModelForCausalLM

from expertmesh.client.router import RouterClient
from expertmesh.client.skeleton import load_skeleton
from expertmesh.services.parity import PaddedPrompts, generate_greedy, random_prompts

NUM_GROUPS = {"fp32": 2, "bf16": 1}
"""A process per group takes seconds; bfloat16 over four groups is what the demo model is."""
LOCAL_SOCKET = {"fp32": False, "bf16": True}
"""One wave as between hosts, one as on one host."""
NUM_CALLERS = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = 1e-5

pytestmark = pytest.mark.timeout(420)


@dataclass(frozen=True)
class Wave:
    """Every family's checkpoint in one dtype, deployed."""

    cluster: Cluster
    paths: dict[str, Path]


@pytest.fixture(scope="module", params=DTYPES)
def wave(
    request: pytest.FixtureRequest, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Wave]:
    """All families at once: their processes start side by side."""
    root = tmp_path_factory.mktemp(request.param)
    dtype, num_groups = DTYPES[request.param], NUM_GROUPS[request.param]
    paths = {name: tiny_checkpoint(name, root / name, dtype=dtype) for name in FAMILIES}
    groups = [
        args
        for family, path in paths.items()
        for args in cluster.group_args(
            path,
            f"{family}-{request.param}",
            num_groups,
            local_socket=LOCAL_SOCKET[request.param],
        )
    ]
    with cluster.running(groups):
        yield Wave(cluster, {f"{family}-{request.param}": path for family, path in paths.items()})


@torch.no_grad()
def logits(model: Any, prompts: PaddedPrompts) -> torch.Tensor:
    """[B, S, V]"""
    out: torch.Tensor = model(prompts.tokens_BS, attention_mask=prompts.mask_BS).logits
    return out


def load_full(path: Path) -> Any:
    """The reference: all of the model in this process."""
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_are_those_of_transformers(wave: Wave, family: str) -> None:
    model = next(name for name in wave.paths if name.rpartition("-")[0] == family)
    path, prompts = wave.paths[model], random_prompts(VOCAB_SIZE)
    reference = load_full(path)
    with wave.cluster.router(path, model) as address, RouterClient(address) as caller:
        skeleton = load_skeleton(path, caller)
        assert torch.equal(logits(skeleton, prompts), logits(reference, prompts))
        served, alone = generate_greedy(skeleton, prompts), generate_greedy(reference, prompts)
    assert torch.equal(served.tokens_BN, alone.tokens_BN)
    assert torch.equal(served.logits_NBV, alone.logits_NBV)


@pytest.mark.parametrize("deterministic", [True, False])
def test_eight_callers_at_once(cluster: Cluster, tmp_path: Path, deterministic: bool) -> None:
    """Deterministic: bit-equal to alone. Otherwise merged products: 1e-5 and the same tokens."""
    path = tiny_checkpoint("mixtral", tmp_path)
    model = f"mixtral-{'deterministic' if deterministic else 'merging'}"
    groups = cluster.group_args(path, model, 2, deterministic=deterministic)
    reference = load_full(path)
    prompts = [random_prompts(VOCAB_SIZE, seed) for seed in range(NUM_CALLERS)]
    alone = [generate_greedy(reference, own) for own in prompts]
    with (
        cluster.running(groups),
        cluster.router(path, model) as address,
        RouterClient(address) as caller,
        ThreadPoolExecutor(NUM_CALLERS) as threads,
    ):
        skeletons = [load_skeleton(path, caller) for _ in prompts]
        served = list(threads.map(generate_greedy, skeletons, prompts))
    for got, expected in zip(served, alone, strict=True):
        assert torch.equal(got.tokens_BN, expected.tokens_BN)
        atol = 0.0 if deterministic else TOLERANCE
        torch.testing.assert_close(got.logits_NBV, expected.logits_NBV, rtol=0, atol=atol)
