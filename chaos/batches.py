"""Layer calls with the answers transformers gives: what callers send, and compare bit by bit.

T tokens, D hidden size, K experts per token.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from expertmesh.client.generate import request_of
from expertmesh.runtime.tensors import to_proto
from expertmesh.services.parity import generate_greedy, pad_left
from expertmesh.v1 import generate_pb2, router_pb2

NUM_BATCHES = 16
NUM_PROMPTS = 4
PROMPT_TOKENS = 12


def load_reference(model_dir: Path) -> Any:
    """The whole model in this process."""
    disable_progress_bar()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", local_files_only=True)
    return model.eval()


def write_batches(reference: Any, num_tokens: int, into: Path, experts: range | None = None) -> int:
    """Requests and expected answers, as many of each layer of a Mixtral.

    Args:
        num_tokens: of each call.
        into: an empty directory; gets N.request and N.expected, protobuf messages.
        experts: the only ones that tokens may choose, or all.

    Returns:
        How many there are.
    """
    into.mkdir(parents=True)
    blocks = [layer.mlp for layer in reference.model.layers]
    random = torch.Generator().manual_seed(num_tokens)
    for number in range(NUM_BATCHES):
        layer = number % len(blocks)
        request, expected = _batch(blocks[layer], layer, num_tokens, random, experts)
        (into / f"{number}.request").write_bytes(request.SerializeToString())
        (into / f"{number}.expected").write_bytes(expected.SerializeToString())
    return NUM_BATCHES


def write_prompts(reference: Any, into: Path) -> int:
    """Requests of GenerateService and the tokens that transformers generates, greedily.

    Args:
        into: see `write_batches`.

    Returns:
        How many there are.
    """
    into.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    for number in range(NUM_PROMPTS):
        drawn = torch.randint(3, reference.config.vocab_size, (PROMPT_TOKENS,), generator=random)
        prompt = drawn.tolist()
        alone = generate_greedy(reference, pad_left([prompt], pad_id=0))
        tokens = alone.tokens_BN[0].tolist()
        request = request_of(prompt, max_new_tokens=len(tokens), ignore_eos=True)
        expected = generate_pb2.GenerateResponse(tokens=tokens)
        (into / f"{number}.request").write_bytes(request.SerializeToString())
        (into / f"{number}.expected").write_bytes(expected.SerializeToString())
    return NUM_PROMPTS


@torch.inference_mode()
def _batch(
    block: Any, layer: int, num_tokens: int, random: torch.Generator, experts: range | None
) -> tuple[router_pb2.DispatchRequest, router_pb2.DispatchResponse]:
    weight_ED = block.gate.weight
    hidden_TD = torch.randn(num_tokens, weight_ED.shape[1], generator=random).to(weight_ED.dtype)
    scores_TE = (hidden_TD @ weight_ED.t()).float()
    if experts is not None:
        kept = torch.zeros(weight_ED.shape[0], dtype=torch.bool)
        kept[experts] = True
        scores_TE = scores_TE.masked_fill(~kept, -torch.inf)
    weights_TK, experts_TK = scores_TE.softmax(-1).topk(block.gate.top_k)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    out_TD = block.experts(hidden_TD, experts_TK, weights_TK)
    request = router_pb2.DispatchRequest(
        layer=layer,
        hidden=to_proto(hidden_TD),
        experts=to_proto(experts_TK),
        weights=to_proto(weights_TK),
    )
    return request, router_pb2.DispatchResponse(hidden=to_proto(out_TD))
