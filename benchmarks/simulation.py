"""What scaling each group by itself saves on real arrivals, simulated: beside static meshes, beside
scaling the whole model, and beside what nobody can go below."""

import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.report import RESULTS, Bar, Report, Row
from expertmesh.services.simulator.scenario import Scenario
from expertmesh.services.simulator.sizing import (
    busy_replicas_WG,
    oracle_gpu_s,
    sized_for_objective,
    sized_for_peak,
)
from expertmesh.services.simulator.studies import Run, simulate, with_policy

OBJECTIVES_S = {"code": 5.0, "conv": 2.0}
GATEWAYS = {"code": 32, "conv": 8}
RATE, GROUPS, START_S, SPREAD_S = 40.0, 8, 6.8, 10.0
POPULARITIES: Mapping[str, Mapping[str, Any]] = {
    "Mixtral": {"kind": "counts", "file": "mixtral_expert_popularity.json", "drift_s": 120},
    "skewed": {
        "kind": "lognormal",
        "sigma": 0.6,
        "layers": "alike",
        "drift_s": 120,
        "drift_frac": 0.25,
    },
}
RULE = {
    "max_replicas": 64,
    "target_busy_frac": 0.7,
    "hysteresis_frac": 0.0,
    "max_queue_delay_s": 0.5,
    "catch_up_s": 2,
    "up_window_s": 5,
    "down_window_s": 15,
    "memory_s": 20,
    "lead_s": 0,
}
LEAST: Mapping[tuple[str, str], int] = {
    ("code", "replicas"): 16,
    ("code", "gateways"): 8,
    ("conv", "replicas"): 1,
    ("conv", "gateways"): 1,
}
"""`min_replicas` by trace and by what the rule sees: what takes a burst while others start."""
TOLD = "groups, told of prompts"
_ABOUT = (
    "The first 29 minutes of the Azure LLM traces, 40 requests for each row, within ten seconds of "
    "it (so many tenants, busy in the same minute, not in the same instant); a Mixtral-8x7B on "
    "H100s, an expert in each of 8 groups, 32 gateways for code, 8 for conv; a replica needs 4 s "
    "and 2.8 s for its weights. The rule sees what replicas report, as in a running mesh; **told "
    "of prompts** is what it would do if gateways reported what waits at them. **Mixtral**: "
    "its counts by subject, another subject every two minutes; **skewed**: a lognormal of 0.6, a "
    "quarter of the experts permuted every two minutes. **tested** is the static mesh that load "
    "tests with the whole trace lead to: groups that are above 70 % busy in their busiest ten "
    "seconds grow until the objective is met. **peak** gives each group what its busiest ten "
    "seconds in that test need at 70 %, the rule's own target. **whole** gives all groups what the "
    "neediest needs; **groups** scales each by itself. **oracle** is not simulated: it knows the "
    "load of *peak* ten seconds at a time before it comes, keeps 70 %, and starts replicas in time."
)


def data_folder() -> Path:
    """Where the traces are."""
    return Path(os.environ.get("EXPERTMESH_DATA", RESULTS.parents[2] / "shared" / "data"))


def _scenario(trace: str, popularity: str, sees: str) -> Scenario:
    return Scenario.model_validate(
        {
            "trace": {
                "file": f"azure_llm_2023_{trace}_first_half.csv",
                "rate": RATE,
                "spread_s": SPREAD_S,
            },
            "mesh": {
                "groups": GROUPS,
                "gateways": GATEWAYS[trace],
                "gpus": "h100",
                "forward_tokens": 8192,
            },
            "popularity": POPULARITIES[popularity],
            "scaling": {
                "replicas": [16],
                "sees": sees,
                "rule": {**RULE, "min_replicas": LEAST[trace, sees]},
            },
            "objective": {"ttft_p99_s": OBJECTIVES_S[trace]},
            "sampling": {"layers": 1, "forwards": 8, "every_s": 20, "window_s": 0.5},
        }
    )


@dataclass(frozen=True)
class Study:
    """Runs of one trace with one popularity, by policy."""

    runs: Mapping[str, Run]
    oracle_frac: float
    """GPU-seconds of the oracle over those of peak."""

    def of(self, policy: str, base: str) -> float:
        """GPU-seconds over those of another policy."""
        return self.runs[policy].outcome.gpu_s / self.runs[base].outcome.gpu_s


def study(trace: str, popularity: str) -> Study:
    """All policies on the same requests."""
    own, told = (_scenario(trace, popularity, sees) for sees in ("replicas", "gateways"))
    folder, target = data_folder(), float(RULE["target_busy_frac"])
    tested = sized_for_objective(own, folder, [3] * GROUPS, target)
    peak = sized_for_peak(tested, folder, target)
    runs = {"tested": tested, "peak": peak}
    for policy in ("whole", "groups"):
        runs[policy] = simulate(with_policy(own, policy), folder)
    runs[TOLD] = simulate(told, folder)
    least_s = oracle_gpu_s(busy_replicas_WG(peak.outcome), target, START_S)
    return Study(runs, least_s / peak.outcome.gpu_s)


def _row(name: str, run: Run, found: Study) -> Row:
    own = run.numbers
    return {
        "policy": name,
        "GPU-seconds": own["gpu_seconds"],
        "of peak": f"{found.of(name, 'peak'):.0%}",
        "replicas, mean": own["mean_replicas"],
        "most": own["most_replicas"],
        "busy": f"{own['busy_frac']:.0%}",
        "first token p50, s": own["ttft_p50_s"],
        "p99, s": own["ttft_p99_s"],
        "resizes": own["resizes"],
        "objective": "met" if run.meets_objective else "MISSED",
    }


def _report(report: Report, trace: str, popularity: str, found: Study) -> None:
    objective, name = OBJECTIVES_S[trace], f"{trace}, {popularity}"
    report.tables[f"{name} (first token p99 <= {objective:g} s)"] = [
        _row(policy, run, found) for policy, run in found.runs.items()
    ]
    report.raw[name] = {
        "oracle_of_peak": found.oracle_frac,
        "peak": found.runs["peak"].scenario.scaling.replicas,
        "tested": found.runs["tested"].scenario.scaling.replicas,
    }
    oracle = f"(the oracle: {found.oracle_frac:.0%})"
    for policy in ("groups", TOLD):
        late_s = found.runs[policy].numbers["ttft_p99_s"]
        gpu_frac = found.of(policy, "peak")
        report.bars += [
            Bar(f"{name}, {policy}: p99 of the first token", late_s, objective, True, "s"),
            Bar(f"{name}, {policy}: GPU-seconds of peak {oracle}", gpu_frac, 0.6, True),
        ]
    whole_frac = found.of("groups", "whole")
    report.bars.append(Bar(f"{name}: GPU-seconds of whole", whole_frac, 0.8, True))


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("simulation", _ABOUT)
    if quick:  # the traces are not part of this checkout
        return report
    cases = [(trace, popularity) for popularity in POPULARITIES for trace in OBJECTIVES_S]
    with ProcessPoolExecutor(2) as pool:
        for case, found in zip(cases, pool.map(study, *zip(*cases, strict=True)), strict=True):
            _report(report, *case, found)
    return report
