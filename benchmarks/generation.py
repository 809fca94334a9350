"""Text through the gateway beside transformers' own `generate` in this process.

B prompts of a batch, S positions.
"""

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from benchmarks.harness.gateway import gateway_process
from benchmarks.harness.mesh import bench_mesh
from benchmarks.harness.report import Bar, Report, Row
from benchmarks.harness.turns import ClosedLoop, Contestant, Turns, ratio, summary, take_turns
from expertmesh.client import Client
from expertmesh.services.parity import pad_left

NUM_NEW = 48
GROUPS = 4
_LENGTHS = (16, 20, 24, 28, 32, 36, 40, 48)
DEMO = Path(__file__).parents[1] / "examples" / "demo-moe"
_ABOUT = (
    f"{NUM_NEW} new tokens, greedy, prompts of {min(_LENGTHS)} to {max(_LENGTHS)} tokens, one "
    "prompt and eight at once. **transformers** is `model.generate` in one process with two "
    "threads; eight prompts are one left-padded batch, all known at the start. **ours** is a "
    f"gateway and {GROUPS} expert groups in processes of their own with the settings of "
    "`expertmesh serve`, called over gRPC by clients that know nothing of each other. *as alone* "
    "counts the prompts whose tokens are those that transformers gives each prompt alone: batches "
    "change last bits, in transformers' too."
)
_BOUNDS = {"demo": {1: 0.5, 8: 0.9}, "200M": {1: 0.85, 8: 0.95}}


def random_mixtral(root: Path) -> tuple[Path, MixtralConfig]:
    """200 million parameters, nine tenths of them experts."""
    path = root / "mixtral-200m"
    config = MixtralConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1280,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        dtype="float32",
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(path)
    return path, config


def _prompts(count: int, vocab_size: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(count)
    lengths = _LENGTHS[:count] if count > 1 else _LENGTHS[4:5]
    return [torch.randint(2, vocab_size, (n,), generator=random).tolist() for n in lengths]


Generate = Callable[[], list[list[int]]]


def _local(model: Any, prompts: list[list[int]]) -> Generate:
    padded = pad_left(prompts, pad_id=0)

    def generate() -> list[list[int]]:
        out_BS = model.generate(
            padded.tokens_BS,
            attention_mask=padded.mask_BS,
            max_new_tokens=NUM_NEW,
            min_new_tokens=NUM_NEW,
            do_sample=False,
            pad_token_id=0,
        )
        tokens: list[list[int]] = out_BS[:, padded.tokens_BS.shape[1] :].tolist()
        return tokens

    return generate


def _ours(address: str, prompts: list[list[int]], stack: ExitStack) -> Generate:
    pool = stack.enter_context(ThreadPoolExecutor(len(prompts)))
    clients = [stack.enter_context(Client(address)) for _ in prompts]

    def one(client: Client, prompt: list[int]) -> list[int]:
        chunks = client.generate(prompt, max_new_tokens=NUM_NEW, ignore_eos=True)
        return [token for chunk in chunks for token in chunk.tokens]

    return lambda: list(pool.map(one, clients, prompts))


def _equal_to_alone(
    model: Any, prompts: list[list[int]], generate: dict[str, Generate]
) -> dict[str, int]:
    """How many prompts get the tokens that transformers gives each alone, on one thread."""
    torch.set_num_threads(1)
    alone = [_local(model, [prompt])()[0] for prompt in prompts]
    torch.set_num_threads(2)
    return {
        name: sum(own == one for own, one in zip(call(), alone, strict=True))
        for name, call in generate.items()
    }


def _compete(path: Path, count: int, rounds: int, seconds: float) -> tuple[Turns, dict[str, int]]:
    with ExitStack() as stack:
        torch.set_num_threads(2)
        model = AutoModelForCausalLM.from_pretrained(path)
        model.generation_config.eos_token_id = None
        config = model.config
        mesh = stack.enter_context(
            bench_mesh(path, config.num_local_experts, config.num_hidden_layers, GROUPS)
        )
        pid, address = stack.enter_context(gateway_process(path, mesh.redis_url))
        prompts = _prompts(count, config.vocab_size)
        local, ours = _local(model, prompts), _ours(address, prompts, stack)
        equal = _equal_to_alone(model, prompts, {"transformers": local, "ours": ours})
        tokens = count * NUM_NEW
        contestants: list[Contestant] = [
            ClosedLoop("transformers", local, tokens, least=2, warm_up=1),
            ClosedLoop("ours", ours, tokens, lambda: [pid, *mesh.pids()], least=2, warm_up=1),
        ]
        return take_turns(contestants, rounds, seconds), equal


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("generation", _ABOUT)
    with tempfile.TemporaryDirectory() as root:
        models = {"demo": DEMO} if quick else {"demo": DEMO, "200M": random_mixtral(Path(root))[0]}
        for name, path in models.items():
            rows: list[Row] = []
            for count in (1,) if quick else (1, 8):
                turns, equal = _compete(path, count, *((1, 0.5) if quick else (5, 3.0)))
                frac = ratio(turns, "ours", "transformers", lambda turn: turn.tokens_per_s)
                what = f"{name}, {count} prompt{'s' * (count > 1)}: tokens/s of ours / local"
                report.bars.append(Bar(what, frac, _BOUNDS[name][count]))
                rows += [
                    {
                        "prompts": count,
                        "contestant": who,
                        **summary(own),
                        "as alone": equal[who],
                    }
                    for who, own in turns.items()
                ]
            report.tables[name] = rows
    return report
