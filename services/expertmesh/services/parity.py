"""Does a served checkpoint answer exactly as transformers does in one process? Logits bit by bit,
greedy tokens one by one, through the gateway and through the router.

Shape suffixes: B batch, S sequence length, V vocabulary, N new tokens.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from expertmesh.client.failures import error_of
from expertmesh.client.generate import Client
from expertmesh.client.router import RouterClient
from expertmesh.client.skeleton import load_skeleton
from expertmesh.runtime.channels import connect_blocking
from expertmesh.runtime.hf_config import load_config
from expertmesh.runtime.security.access import PLAIN, Access
from expertmesh.runtime.tensors import from_proto, to_proto
from expertmesh.services.checkpoints import model_dtype
from expertmesh.services.local import Endpoints, local_mesh
from expertmesh.services.settings import MeshSettings
from expertmesh.v1 import generate_pb2, generate_pb2_grpc

NUM_NEW_TOKENS = 16
PROMPT_LENGTHS = (17, 11, 14)


@dataclass(frozen=True)
class Check:
    """One comparison."""

    what: str
    equal: bool
    detail: str


@dataclass(frozen=True)
class PaddedPrompts:
    """Prompts of different lengths, padded on the left."""

    tokens_BS: torch.Tensor
    mask_BS: torch.Tensor

    def rows(self) -> list[list[int]]:
        """Each prompt without its padding."""
        pairs = zip(self.tokens_BS, self.mask_BS, strict=True)
        return [tokens[mask.bool()].tolist() for tokens, mask in pairs]


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> PaddedPrompts:
    """The prompts as one batch."""
    length = max(map(len, prompts))
    tokens_BS = torch.full((len(prompts), length), pad_id)
    mask_BS = torch.zeros_like(tokens_BS)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, length - len(prompt) :] = torch.tensor(prompt)
        mask_BS[row, length - len(prompt) :] = 1
    return PaddedPrompts(tokens_BS, mask_BS)


def random_prompts(vocab_size: int, seed: int = 0) -> PaddedPrompts:
    """A few random prompts of different lengths, the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    low = min(3, vocab_size - 1)  # ids below are usually special
    drawn = torch.randint(low, vocab_size, (sum(PROMPT_LENGTHS),), generator=random)
    prompts = [part.tolist() for part in torch.split(drawn, list(PROMPT_LENGTHS))]
    return pad_left(prompts, pad_id=0)


def load_reference(settings: MeshSettings) -> Any:
    """The whole model in this process, as a user of transformers loads it."""
    disable_progress_bar()
    torch.set_num_threads(settings.gateway.threads)  # fp32 bits can depend on it
    dtype = model_dtype(settings.dtype, load_config(settings.model))
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, local_files_only=True)
    return model.eval()


def compare(
    reference: Any, settings: MeshSettings, endpoints: Endpoints, prompts: PaddedPrompts
) -> list[Check]:
    """Every comparison of a running mesh with `reference`."""
    return [
        _logits_of_gateway(reference, endpoints, prompts),
        *_generation_through_router(reference, settings, endpoints, prompts),
        _tokens_of_gateway(reference, endpoints, prompts),
    ]


def _difference(what: str, expected: torch.Tensor, got: torch.Tensor) -> Check:
    if expected.shape != got.shape or expected.dtype != got.dtype:
        forms = [f"{t.dtype}{list(t.shape)}" for t in (got, expected)]
        return Check(what, False, f"{forms[0]} instead of {forms[1]}")
    if torch.equal(expected, got):
        return Check(what, True, f"{expected.numel()} values bit-equal")
    away = (expected.double() - got.double()).abs()
    share = (away > 0).double().mean().item()
    return Check(what, False, f"{share:.1%} of values differ, by {away.max().item():.1e} at most")


@torch.no_grad()
def _logits_of_gateway(reference: Any, endpoints: Endpoints, prompts: PaddedPrompts) -> Check:
    expected_BSV = reference(prompts.tokens_BS, attention_mask=prompts.mask_BS).logits
    got_BSV = score(endpoints.gateway, prompts, endpoints.access)
    size = list(prompts.tokens_BS.shape)
    return _difference(f"logits of {size} left-padded tokens, gateway", expected_BSV, got_BSV)


def score(gateway: str, prompts: PaddedPrompts, access: Access = PLAIN) -> torch.Tensor:
    """Logits [B, S, V] as the gateway computes them."""
    request = generate_pb2.ScoreRequest(
        tokens=to_proto(prompts.tokens_BS), mask=to_proto(prompts.mask_BS)
    )
    with connect_blocking(gateway, access) as channel:
        try:
            stub = generate_pb2_grpc.GenerateServiceStub(channel)
            reply = stub.Score(request, metadata=access.metadata())
        except grpc.RpcError as failure:
            raise error_of(failure) from None
    return from_proto(reply.logits, "logits")


@dataclass(frozen=True)
class Greedy:
    """What greedy generation gave."""

    tokens_BN: torch.Tensor
    """New tokens."""
    logits_NBV: torch.Tensor
    """Of each step."""


def generate_greedy(model: Any, prompts: PaddedPrompts) -> Greedy:
    """`NUM_NEW_TOKENS` tokens by transformers' own generate, past any end-of-sequence token."""
    out = model.generate(
        prompts.tokens_BS,
        attention_mask=prompts.mask_BS,
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Greedy(out.sequences[:, prompts.tokens_BS.shape[1] :], torch.stack(out.logits))


def _generation_through_router(
    reference: Any, settings: MeshSettings, endpoints: Endpoints, prompts: PaddedPrompts
) -> list[Check]:
    with RouterClient(endpoints.router, access=endpoints.access) as caller:
        skeleton = load_skeleton(settings.model, caller, dtype=reference.dtype)
        expected, got = generate_greedy(reference, prompts), generate_greedy(skeleton, prompts)
    tokens = f"{list(expected.tokens_BN.shape)} greedy tokens, transformers over router"
    steps = "logits of their steps, transformers over router"
    return [
        _difference(tokens, expected.tokens_BN, got.tokens_BN),
        _difference(steps, expected.logits_NBV, got.logits_NBV),
    ]


def _tokens_of_gateway(reference: Any, endpoints: Endpoints, prompts: PaddedPrompts) -> Check:
    expected, got = [], []
    with Client(endpoints.gateway, endpoints.access) as client:
        for prompt in prompts.rows():
            alone = pad_left([prompt], pad_id=0)
            expected.append(generate_greedy(reference, alone).tokens_BN[0])
            chunks = client.generate(prompt, max_new_tokens=NUM_NEW_TOKENS, ignore_eos=True)
            got.append(torch.tensor([token for chunk in chunks for token in chunk.tokens]))
    size = [len(expected), NUM_NEW_TOKENS]
    what = f"{size} greedy tokens, gateway's Generate"
    return _difference(what, torch.stack(expected), torch.stack(got))


def print_verdict(checks: Sequence[Check]) -> bool:
    """Print each comparison; True if all are equal."""
    for check in checks:
        print(f"  {'equal    ' if check.equal else 'DIFFERENT'}  {check.what}: {check.detail}")
    return all(check.equal for check in checks)


async def run_parity(
    settings: MeshSettings, progress: Callable[[str], None], token_file: str | None = None
) -> int:
    """Serve the checkpoint, compare, stop. Exit code 0 only if everything is equal."""
    async with local_mesh(settings, progress, token_file) as endpoints:
        progress("loading the same checkpoint into this process as the reference")
        reference = await asyncio.to_thread(load_reference, settings)
        prompts = random_prompts(reference.config.get_text_config().vocab_size)
        checks = await asyncio.to_thread(compare, reference, settings, endpoints, prompts)
    equal = print_verdict(checks)
    print(f"{endpoints.model}: {'EXACT' if equal else 'NOT EXACT'} against transformers")
    return 0 if equal else 1
