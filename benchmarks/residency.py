"""Half of the experts fit the device: what a quality budget buys, and what it costs.

S positions of a text, V vocabulary.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.harness.mesh import MODEL, BenchMesh, bench_mesh
from benchmarks.harness.plots import BLUE, GREY, ORANGE, figure
from benchmarks.harness.report import Bar, Report, Row
from expertmesh.client.skeleton import load_skeleton
from expertmesh.router.lenient import LenientCalls
from expertmesh.router.selection_options import SelectionOptions
from expertmesh.router.selector import Selector
from expertmesh.router.served_model import ServedModel
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.metrics import Metrics
from expertmesh.services.callers import CoreCaller

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "demo-moe"
GROUPS, LAYERS, EXPERTS = 2, 4, 8
EXPERT_BYTES = 3 * 128 * 256 * 2
BUDGET_BYTES = EXPERT_BYTES * LAYERS * EXPERTS // GROUPS // 2
LINK_BYTES_PER_S = 100e6
LOAD_MS = EXPERT_BYTES / LINK_BYTES_PER_S * 1e3
BUDGETS = (0.05, 0.1, 0.15, 0.3, 0.5)
BY_LAYER = (0.1, 0.2, 0.3)
LAYER_BUDGETS = (0.3, 3.0, 1.0, 1.0)
"""What the demo model's layers bear: swaps in the first one cost most of the perplexity, those in
the second almost none. Found by replaying other stretches of the held-out text."""
PROMPT, NEW = 16, 48
LRU, PREFETCH = "exact, no prefetch", "exact, prefetch"
_HEARD_S = 0.5
PLOT = "residency.svg"
_ABOUT = (
    f"The demo model in {GROUPS} groups, a process each, whose device holds half of their experts. "
    f"Loads are slowed down to {LINK_BYTES_PER_S / 1e6:.0f} MB/s, {LOAD_MS:.1f} ms an expert, "
    "which stands for the link to a GPU: as many times a layer call as a Mixtral expert "
    f"over PCIe is. Held-out text of the model's four domains, switching after {PROMPT} + {NEW} "
    "tokens; one forward for the first, then token by token, each contestant the same text in "
    "turns. A miss is an expert whose weights had to be waited for. Perplexity is of the tokens "
    "that came one by one; its ratio is to exact routing's, in the worst domain. By layer: the "
    f"budgets of the four layers are {', '.join(f'{m:g}' for m in LAYER_BUDGETS)} times as large."
)


@dataclass
class Contestant:
    """A way of routing over one of the meshes."""

    name: str
    mesh: BenchMesh
    caller: CoreCaller
    model: Any
    selector: Selector | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)
    latencies_s: list[float] = field(default_factory=list)
    round_p50s_s: list[float] = field(default_factory=list)
    misses: list[int] = field(default_factory=list)

    def turn(self, texts: dict[str, list[int]]) -> None:
        """One text of each domain."""
        self.caller.selector = self.selector
        before, own = self._misses(), []
        for domain, ids in texts.items():
            losses, times_s = read(self.model, ids)
            self.losses.setdefault(domain, []).extend(losses)
            own += times_s
        self.latencies_s += own
        self.round_p50s_s.append(statistics.fmean(own))
        self.misses.append(self._misses() - before)

    def _misses(self) -> int:
        time.sleep(_HEARD_S)  # the counts come with the heartbeats
        assert self.caller.core
        replicas = self.caller.core.snapshot.replicas.values()
        return sum(replica.state.residency.misses for replica in replicas)

    def perplexity(self, domain: str) -> float:
        """Of the domain's tokens."""
        return math.exp(statistics.fmean(self.losses[domain]))

    @property
    def misses_per_token(self) -> float:
        """Of the tokens that came one by one; those of the prompts count as well."""
        return sum(self.misses) / len(self.latencies_s)


@torch.inference_mode()
def read(model: Any, ids: Sequence[int]) -> tuple[list[float], list[float]]:
    """(loss, seconds) of each token after the prompt, given the true ones before it."""
    cache = DynamicCache()
    logits_V = model(torch.tensor([ids[:PROMPT]]), past_key_values=cache).logits[0, -1]
    losses, times_s = [], []
    for token in ids[PROMPT:]:
        losses.append(-float(logits_V.float().log_softmax(-1)[token]))
        started_s = time.perf_counter()
        logits_V = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
        times_s.append(time.perf_counter() - started_s)
    return losses, times_s


def held_out(rounds: int, *, quick: bool) -> Iterator[dict[str, list[int]]]:
    """For each round a stretch of held-out text of each domain, as tokens."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    if quick:
        prompts: dict[str, str] = json.loads((DEMO / "prompts.json").read_text("utf-8"))
        ids = {domain: tokenizer(text * 9)["input_ids"] for domain, text in prompts.items()}
        yield from (
            {domain: own[: PROMPT + 8] for domain, own in ids.items()} for _ in range(rounds)
        )
        return
    sys.path.insert(0, str(ROOT / "examples" / "train"))
    from corpus import load_corpus
    from tokens import encode, split_documents
    from training import Recipe

    recipe = Recipe()
    streams = {
        domain: encode(tokenizer, split_documents(documents, recipe.held_out_frac)[1]).tolist()
        for domain, documents in load_corpus(recipe.seed, recipe.max_domain_chars).items()
    }
    length = PROMPT + NEW
    for number in range(rounds):
        at = {
            domain: (number * 977 * length) % (len(own) - length) for domain, own in streams.items()
        }
        yield {domain: own[at[domain] : at[domain] + length] for domain, own in streams.items()}


def _meshes(stack: ExitStack) -> list[Contestant]:
    found = []
    for prefetch in (False, True):
        mesh = stack.enter_context(
            bench_mesh(
                DEMO,
                EXPERTS,
                LAYERS,
                GROUPS,
                device_memory_bytes=BUDGET_BYTES,
                simulated_load_bytes_per_s=LINK_BYTES_PER_S,
                prefetch=prefetch,
            )
        )
        model = load_skeleton(DEMO, mesh.caller)
        found.append(Contestant(PREFETCH if prefetch else LRU, mesh, mesh.caller, model))
    served = ServedModel(MODEL, Checkpoint.open(DEMO), model.config, model.dtype)
    own = found[-1]
    assert own.caller.core
    own.caller.lenient = LenientCalls(own.caller.core, Metrics())
    for name, options in _selections():
        selector = Selector(served, own.caller.core, Metrics(), options)
        found.append(Contestant(name, own.mesh, own.caller, own.model, selector))
    return found


def _selections() -> Iterator[tuple[str, SelectionOptions]]:
    for budget in BUDGETS:
        yield f"budget {budget:g}", SelectionOptions(quality_budget=budget)
    for budget in BY_LAYER:
        options = SelectionOptions(quality_budget=budget, layer_budgets=LAYER_BUDGETS)
        yield f"budget {budget:g} by layer", options


def _row(own: Contestant, exact: Contestant) -> Row:
    slower = [
        mine / theirs for mine, theirs in zip(own.round_p50s_s, exact.round_p50s_s, strict=True)
    ]
    worst = max(own.perplexity(domain) / exact.perplexity(domain) for domain in own.losses)
    return {
        "routing": own.name,
        "misses per token": own.misses_per_token,
        "misses / exact": own.misses_per_token / exact.misses_per_token,
        "p50_ms": 1e3 * statistics.median(own.latencies_s),
        "mean_ms": 1e3 * statistics.fmean(own.latencies_s),
        "latency / exact": statistics.median(slower),
        **{f"perplexity, {domain}": own.perplexity(domain) for domain in own.losses},
        "perplexity / exact, worst": worst,
    }


def _plot(rows: Sequence[Row]) -> None:
    same = (0.0, *BUDGETS), rows[1 : len(BUDGETS) + 2], ""
    by_layer = (0.0, *BY_LAYER), [rows[1], *rows[len(BUDGETS) + 2 :]], ", by layer"
    with figure(PLOT, width_inch=8, height_inch=4.6) as drawn:
        axes = drawn.subplots()
        for (budgets, own, suffix), line in ((same, "--"), (by_layer, "-")):
            for name, colour, mark in (
                ("misses / exact", BLUE, "o"),
                ("latency / exact", ORANGE, "s"),
                ("perplexity / exact, worst", GREY, "^"),
            ):
                values = [float(row[name]) for row in own]
                axes.plot(budgets, values, mark + line, color=colour, label=name + suffix)
        axes.set(xlabel="quality budget", ylabel="relative to exact routing with prefetch")
        axes.set_ylim(bottom=0)
        drawn.legend(loc="outside lower center", ncols=2)


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("residency", _ABOUT)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        contestants = _meshes(stack)
        local = AutoModelForCausalLM.from_pretrained(DEMO).eval()
        same = True
        for number, texts in enumerate(held_out(1 if quick else 10, quick=quick)):
            for own in contestants if number % 2 == 0 else reversed(contestants):
                own.turn(texts)
            here = {domain: read(local, ids)[0] for domain, ids in texts.items()}
            for own in contestants[:2]:
                same &= all(own.losses[d][-len(here[d]) :] == here[d] for d in here)
    lru, exact = contestants[:2]
    rows = [_row(own, exact) for own in contestants]
    fine = [row for row in rows[2:] if float(row["perplexity / exact, worst"]) <= 1.01]
    best = min(fine, key=lambda row: float(row["latency / exact"]), default=rows[1])
    named = f"{best['routing']}, at most 1 % perplexity"
    report.bars = [
        Bar(f"{named}: misses / exact", float(best["misses / exact"]), 0.5, at_most=True),
        Bar(f"{named}: latency / exact", float(best["latency / exact"]), 0.82, at_most=True),
        Bar("exact: tokens' losses equal transformers' (1: all)", float(same), 1.0),
        Bar(
            "exact: misses with prefetch / without",
            exact.misses_per_token / lru.misses_per_token,
            0.999,
            at_most=True,
        ),
    ]
    report.tables["Routing under pressure"] = rows
    if not quick:
        _plot(rows)
        report.plots.append(PLOT)
    return report
