"""Simulations of the same arrivals under several policies."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from expertmesh.runtime.errors import ConfigError
from expertmesh.services.simulator.calls import run_calls
from expertmesh.services.simulator.outcome import Outcome
from expertmesh.services.simulator.report import numbers
from expertmesh.services.simulator.scenario import Scenario
from expertmesh.services.simulator.windows import run_windows
from expertmesh.services.simulator.world import build_world

Progress = Callable[[float], None]


def silent(frac: float) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class Run:
    """One simulation and its numbers."""

    scenario: Scenario
    outcome: Outcome
    numbers: dict[str, float]

    @property
    def meets_objective(self) -> bool:
        """Whether users got what they are promised."""
        return self.numbers["ttft_p99_s"] <= self.scenario.objective.ttft_p99_s


def simulate(scenario: Scenario, folder: Path, progress: Progress = silent) -> Run:
    """Simulate a scenario.

    Args:
        folder: from which relative files count.

    Raises:
        InvalidInput, ConfigError: something is wrong; nothing has run.
    """
    world = build_world(scenario, folder)
    run = run_calls if scenario.sampling.engine == "calls" else run_windows
    outcome = run(world, progress)
    return Run(scenario, outcome, numbers(outcome, world.fleet.computed_s()))


def with_policy(scenario: Scenario, policy: str, *replicas: int) -> Scenario:
    """The scenario under another policy, with other replicas at the beginning if there are any."""
    values = scenario.model_dump()
    values["scaling"]["policy"] = policy
    if replicas:
        values["scaling"]["replicas"] = replicas
    return Scenario.model_validate(values)


def fewest_replicas(
    scenario: Scenario, folder: Path, most: int, progress: Progress = silent
) -> Run:
    """The smallest mesh of equal groups that does not change and meets the objective: known only
    afterwards, to whoever knows all arrivals.

    Raises:
        ConfigError: not even `most` replicas of each group are enough.
    """
    low, high = 0, 1
    best = simulate(with_policy(scenario, "static", high), folder, progress)
    while not best.meets_objective and high < most:
        low, high = high, min(most, 2 * high)
        best = simulate(with_policy(scenario, "static", high), folder, progress)
    if not best.meets_objective:
        raise ConfigError.of(
            "objective.ttft_p99_s",
            expected=f"something that {most} replicas of each group can meet",
            got=f"{scenario.objective.ttft_p99_s:g}",
            hint=f"With them p99 is {best.numbers['ttft_p99_s']:.2f} s.",
        )
    while high - low > 1:
        middle = (low + high) // 2
        run = simulate(with_policy(scenario, "static", middle), folder, progress)
        if run.meets_objective:
            high, best = middle, run
        else:
            low = middle
    return best
