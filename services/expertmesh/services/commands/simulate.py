"""`expertmesh simulate SCENARIO`: what a mesh would do with these requests, by a virtual clock."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from expertmesh.runtime.config import load, parse_value
from expertmesh.runtime.errors import ConfigError
from expertmesh.services.commands.common import Subparsers, progress_printer

if TYPE_CHECKING:
    from expertmesh.services.simulator.scenario import Scenario
    from expertmesh.services.simulator.studies import Run

_STEPS = 4


def add(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "simulate", help="scaling, dispatch and faults of a mesh of virtual replicas"
    )
    parser.add_argument("scenario", type=Path, help="YAML file; fields as in docs/simulation.md")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one field, like --set mesh.gpus=a100x2,l4; may be repeated",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="the same requests with each group scaled, all scaled together, and as many replicas "
        "as would have been enough, known afterwards",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write an HTML page with plots")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Simulate and report."""
    from rich.console import Console

    from expertmesh.services.simulator.page import page
    from expertmesh.services.simulator.report import as_json, render
    from expertmesh.services.simulator.scenario import Scenario

    if not args.scenario.is_file():
        raise ConfigError(f"{args.scenario}: no such file", field="scenario")
    values: dict[str, object] = {}
    for assignment in args.set:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: expected NAME=VALUE", field="--set")
        values[name] = parse_value(text, f"--set {name}")
    scenario = load(Scenario, args.scenario, env={}, overrides=values)
    runs = _runs(args, scenario)
    found = {name: own.numbers for name, own in runs.items()}
    render(Console(highlight=False), scenario, found)
    if args.json:
        args.json.write_text(json.dumps(as_json(scenario, found), indent=1) + "\n", "utf-8")
    if args.page:
        args.page.write_text(page(scenario, runs), "utf-8")
    return 0


def _runs(args: argparse.Namespace, scenario: "Scenario") -> "dict[str, Run]":
    from expertmesh.services.simulator.studies import fewest_replicas, simulate, with_policy

    folder, tell = args.scenario.parent, progress_printer()
    most = scenario.scaling.rule.max_replicas

    def steps(name: str) -> Callable[[float], None]:
        seen = [0]

        def progress(frac: float) -> None:
            if int(frac * _STEPS) > seen[0]:
                seen[0] = int(frac * _STEPS)
                tell(f"{name}: {frac:.0%}")

        return progress

    if not args.compare:
        policy = scenario.scaling.policy
        return {policy: simulate(scenario, folder, steps(policy))}
    runs = {
        policy: simulate(with_policy(scenario, policy), folder, steps(policy))
        for policy in ("groups", "whole")
    }
    return {**runs, "static": fewest_replicas(scenario, folder, most, steps("static"))}
