"""The numbers of simulations: as a table to read, and as JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from expertmesh.services.simulator.outcome import Outcome, percentile, token_gaps_s
from expertmesh.services.simulator.scenario import Scenario

Numbers = Mapping[str, float]

_SHOWN: Sequence[tuple[str, str, str]] = (
    ("gpu_seconds", "GPU-seconds", ",.0f"),
    ("mean_replicas", "replicas, mean", ".1f"),
    ("most_replicas", "replicas, most", ".0f"),
    ("busy_frac", "busy", ".0%"),
    ("ttft_p50_s", "first token, p50 s", ".2f"),
    ("ttft_p95_s", "p95 s", ".2f"),
    ("ttft_p99_s", "p99 s", ".2f"),
    ("token_gap_p99_s", "between tokens, p99 s", ".3f"),
    ("failed_requests", "failed", ".0f"),
    ("resizes", "resizes", ".0f"),
    ("lost_replicas", "replicas lost", ".0f"),
)


def numbers(outcome: Outcome, busy_s: float) -> dict[str, float]:
    """What a report says of an outcome.

    Args:
        busy_s: seconds that replicas computed.
    """
    most = [sum(ready) for ready in outcome.series.ready]
    return {
        "requests": len(outcome.arrivals),
        "failed_requests": outcome.failed,
        "duration_s": outcome.end_s,
        "tokens": outcome.tokens,
        "rows": outcome.rows,
        "gpu_seconds": outcome.gpu_s,
        "mean_replicas": outcome.gpu_s / outcome.end_s if outcome.end_s else 0.0,
        "most_replicas": max(most, default=0),
        "busy_frac": busy_s / outcome.gpu_s if outcome.gpu_s else 0.0,
        "ttft_p50_s": percentile(outcome.ttft_s, 0.50),
        "ttft_p95_s": percentile(outcome.ttft_s, 0.95),
        "ttft_p99_s": percentile(outcome.ttft_s, 0.99),
        "token_gap_p50_s": percentile(token_gaps_s(outcome), 0.50),
        "token_gap_p99_s": percentile(token_gaps_s(outcome), 0.99),
        "imbalance": outcome.imbalance,
        "planned_calls": outcome.planned_calls,
        "resizes": outcome.changes,
        "lost_replicas": outcome.lost,
    }


def as_json(scenario: Scenario, found: Mapping[str, Numbers]) -> dict[str, Any]:
    """Everything for programs; what is infinite (the first token of a request that failed) is
    null."""
    policies = {
        name: {key: value if math.isfinite(value) else None for key, value in own.items()}
        for name, own in found.items()
    }
    return {"scenario": scenario.model_dump(mode="json"), "policies": policies}


def render(console: Console, scenario: Scenario, found: Mapping[str, Numbers]) -> None:
    """The table to read, and what in it is not simulated one by one."""
    table = Table("", *found)
    for key, name, form in _SHOWN:
        table.add_row(name, *(format(own[key], form) for own in found.values()))
    console.print(table)
    first = next(iter(found.values()))
    console.print(
        f"{first['requests']:,.0f} requests, {first['tokens']:,.0f} tokens in "
        f"{first['duration_s']:,.0f} s. {sampled(scenario, first)}"
    )
    for name, own in found.items():
        late = own["ttft_p99_s"] > scenario.objective.ttft_p99_s
        verdict = "misses" if late else "meets"
        console.print(f"{name}: {verdict} first token p99 <= {scenario.objective.ttft_p99_s:g} s")


def sampled(scenario: Scenario, own: Numbers) -> str:
    """What was simulated one by one."""
    layers, sampling = scenario.model.layers, scenario.sampling
    num_layers = min(sampling.layers, layers)
    what = f"{num_layers} of {layers} layers"
    if sampling.engine == "calls":
        return f"Simulated: every call of {what}, {own['planned_calls']:,.0f} calls."
    return (
        f"Sampled: {own['planned_calls']:,.0f} calls of {what} went through the router's code; "
        "forwards in between are like them."
    )
