"""The demo: one prompt from each of the model's domains, the experts each used, and the proof."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from expertmesh.client.generate import Client
from expertmesh.services.local import Endpoints, local_mesh
from expertmesh.services.settings import MeshSettings
from expertmesh.services.signals import forever
from expertmesh.services.status import MeshView
from expertmesh.v1 import control_pb2

NUM_NEW_TOKENS = 48
PROMPTS_NAME = "prompts.json"
_FALLBACK = {"text": "The quick brown fox"}
Usage = Mapping[int, list[int]]
"""Layer -> rows of each expert."""


async def run_demo(
    settings: MeshSettings,
    progress: Callable[[str], None],
    *,
    keep: bool,
    token_file: str | None = None,
) -> int:
    """Exit code 0 only if logits and tokens equal transformers'."""
    console = Console(highlight=False)
    async with local_mesh(settings, progress, token_file) as endpoints:
        prompts = _prompts(Path(settings.model))
        used = {
            domain: await asyncio.to_thread(_generate, console, domain, prompt, endpoints)
            for domain, prompt in prompts.items()
        }
        _print_usage(console, used)
        progress("comparing with transformers in this process")
        equal = await asyncio.to_thread(_compare, settings, endpoints, list(prompts.values()))
        if keep:
            await _keep(endpoints)
    progress("everything has stopped")
    verdict = "equal, bit for bit" if equal else "NOT equal"
    print(f"logits and tokens of the mesh and of single-process transformers: {verdict}")
    return 0 if equal else 1


def _prompts(model_dir: Path) -> dict[str, str]:
    file = model_dir / PROMPTS_NAME
    if not file.is_file():
        return _FALLBACK
    prompts: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return prompts


def _generate(console: Console, domain: str, prompt: str, endpoints: Endpoints) -> Usage:
    """Stream one answer to the console; returns the experts it used."""
    console.print(f"\n[bold]{domain}[/]")
    access = endpoints.access
    with MeshView(endpoints.gateway, access) as view, Client(endpoints.gateway, access) as client:
        before, started_s = _usage(view.usage()), time.monotonic()
        console.print(prompt, end="", style="dim", markup=False)
        num_tokens = 0
        for chunk in client.generate(prompt, max_new_tokens=NUM_NEW_TOKENS):
            console.print(chunk.text, end="", markup=False)
            num_tokens += len(chunk.tokens)
        took_s = time.monotonic() - started_s
        console.print(f"\n[dim]{num_tokens} tokens, {num_tokens / took_s:.0f} per second[/]")
        after = _usage(view.usage())
    return {
        layer: [b - a for a, b in zip(before[layer], rows, strict=True)]
        for layer, rows in after.items()
    }


def _usage(reply: control_pb2.GetExpertUsageResponse) -> dict[int, list[int]]:
    return {layer.layer: list(layer.rows) for layer in reply.layers}


def _print_usage(console: Console, used: Mapping[str, Usage]) -> None:
    """Per domain and layer the experts that got the most rows."""
    layers = sorted(next(iter(used.values())))
    table = Table("domain", *(f"layer {layer}" for layer in layers))
    table.title = "experts that each domain used most (share of its rows)"
    for domain, usage in used.items():
        table.add_row(domain, *(_busiest(usage[layer]) for layer in layers))
    console.print()
    console.print(table)


def _busiest(rows: list[int], num_shown: int = 3) -> str:
    total = max(1, sum(rows))
    ranked = sorted(range(len(rows)), key=lambda expert: -rows[expert])[:num_shown]
    return "  ".join(f"{expert}: {rows[expert] / total:.0%}" for expert in ranked)


def _compare(settings: MeshSettings, endpoints: Endpoints, texts: list[str]) -> bool:
    # only now: the mesh starts seconds earlier without them
    from transformers import AutoTokenizer

    from expertmesh.services.parity import compare, load_reference, pad_left, print_verdict

    tokenizer = AutoTokenizer.from_pretrained(settings.model, local_files_only=True)
    prompts = pad_left([tokenizer.encode(text) for text in texts], tokenizer.pad_token_id or 0)
    return print_verdict(compare(load_reference(settings), settings, endpoints, prompts))


async def _keep(endpoints: Endpoints) -> None:
    print("\nthe mesh stays up; Ctrl-C stops it")
    print(f"  gateway  {endpoints.gateway}   try: expertmesh generate 'def main('")
    print(f"  router   {endpoints.router}   try: expertmesh status --target {endpoints.router}")
    print(f"  redis    {endpoints.redis_url}", flush=True)
    await forever()
