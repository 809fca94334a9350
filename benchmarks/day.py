"""A day of a mesh of 1,000 replicas, simulated: how long that takes."""

import time

from benchmarks.harness.report import Bar, Report, Row
from benchmarks.simulation import RULE, data_folder
from expertmesh.services.simulator.scenario import Scenario
from expertmesh.services.simulator.studies import simulate

_ABOUT = (
    "The first 29 minutes of the Azure trace `conv`, 25 requests for each row, again and again "
    "for a day, thinned out by night; 8 groups that begin with 125 replicas each and are scaled by "
    "the rule, 64 gateways. On one core; other processes were on the machine."
)


def _day() -> tuple[Row, Bar]:
    """1,000 replicas, a day."""
    own = Scenario.model_validate(
        {
            "trace": {
                "file": "azure_llm_2023_conv_first_half.csv",
                "rate": 25,
                "duration_s": 86400,
                "daily_swing": 0.8,
            },
            "mesh": {"groups": 8, "gateways": 64, "gpus": "l4", "forward_tokens": 4096},
            "scaling": {"replicas": [125], "rule": {**RULE, "max_replicas": 125}, "decide_s": 15},
            "sampling": {"layers": 1, "forwards": 1, "every_s": 300, "window_s": 5},
        }
    )
    started_s = time.monotonic()
    run = simulate(own, data_folder())
    took_s = time.monotonic() - started_s
    row: Row = {
        "requests": run.numbers["requests"],
        "tokens": run.numbers["tokens"],
        "most replicas": run.numbers["most_replicas"],
        "mean": run.numbers["mean_replicas"],
        "first token p99, s": run.numbers["ttft_p99_s"],
        "planned calls": run.numbers["planned_calls"],
        "wall clock, s": took_s,
    }
    return row, Bar("a day of up to 1,000 replicas: wall clock", took_s / 60, 10, True, "min")


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("day", _ABOUT)
    if quick:  # the traces are not part of this checkout
        return report
    row, bar = _day()
    report.tables["A day of a mesh of up to 1,000 replicas"] = [row]
    report.bars.append(bar)
    return report
