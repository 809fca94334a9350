"""Replicas of groups over time, as a router and as Serve have them."""

import asyncio
import time
from collections import Counter
from types import TracebackType
from typing import Any, Self

from benchmarks.harness.elastic_load import Load
from benchmarks.harness.plots import BLUE, GREY, ORANGE, figure
from expertmesh.router.core import RouterCore

_EVERY_S = 0.1


class View:
    """Replicas that take rows now."""

    def __init__(self, core: RouterCore) -> None:
        self._core = core

    def counts(self) -> Counter[str]:
        """By group."""
        replicas = self._core.snapshot.replicas.values()
        return Counter(replica.state.group for replica in replicas if replica.takes_work)

    def ready(self, group: str) -> int:
        """Of one group."""
        return self.counts()[group]


def _targets() -> dict[str, int]:
    """What Serve is to have, by group; blocks for some ms."""
    import ray
    from ray import serve

    targets: dict[str, int] = {}
    if not ray.is_initialized():  # it has ended: asking would start another
        return targets
    for name, own in serve.status().applications.items():
        for deployment in own.deployments.values():
            states: dict[str, int] = {str(s): n for s, n in deployment.replica_states.items()}
            targets[name] = states.get("RUNNING", 0) + states.get("STARTING", 0)
    return targets


class Watch:
    """Looks ten times a second, as long as `async with` lasts."""

    def __init__(self, view: View, load: Load) -> None:
        self._view = view
        self._load = load
        self.groups = sorted(load.rates)
        self._looks: list[tuple[float, Counter[str], dict[str, float]]] = []
        self._wanted: list[tuple[float, dict[str, int]]] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._look()), asyncio.create_task(self._ask())]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _look(self) -> None:
        while True:
            rates = dict(self._load.rates)
            self._looks.append((time.monotonic(), self._view.counts(), rates))
            await asyncio.sleep(_EVERY_S)

    async def _ask(self) -> None:
        """Serve's own view, from another thread: asking takes 30 ms."""
        while True:
            targets = await asyncio.to_thread(_targets)
            self._wanted.append((time.monotonic(), targets))
            await asyncio.sleep(2 * _EVERY_S)

    def most(self, group: str, since_s: float) -> int:
        """Greatest number of replicas that took rows."""
        return max(counts[group] for at_s, counts, _ in self._looks if at_s >= since_s)

    def last(self, group: str) -> int:
        """Replicas in the end."""
        return self._looks[-1][1][group]

    def wanted_more_s(self, group: str, since_s: float) -> float:
        """When Serve began to start one more."""
        return next(
            at_s for at_s, targets in self._wanted if at_s >= since_s and targets.get(group, 0) > 1
        )

    def series(self, zero_s: float) -> dict[str, Any]:
        """Everything, for the JSON."""
        return {
            "s": [round(at_s - zero_s, 2) for at_s, _, _ in self._looks],
            **{group: [counts[group] for _, counts, _ in self._looks] for group in self.groups},
        }


def plot(name: str, watch: Watch, zero_s: float) -> str:
    """results/NAME: load and replicas of the first group, replicas of the others."""
    seconds = [at_s - zero_s for at_s, _, _ in watch._looks]
    hot, *others = watch.groups
    base = watch._looks[0][2][hot]
    with figure(name, width_inch=8, height_inch=3.6) as drawn:
        axes = drawn.subplots()
        loads = [rates[hot] / base for _, _, rates in watch._looks]
        axes.step(seconds, loads, color=GREY, linestyle=":", label=f"load of {hot} (x)")
        for group in others:
            own = [counts[group] + 0.0 for _, counts, _ in watch._looks]
            label = "replicas of each other group" if group == others[0] else None
            axes.step(seconds, own, color=BLUE, linestyle="--", label=label)
        own = [counts[hot] + 0.0 for _, counts, _ in watch._looks]
        axes.step(seconds, own, color=ORANGE, label=f"replicas of {hot} that take rows")
        axes.set(xlabel="seconds since the step", ylabel="replicas, times the load")
        axes.set_ylim(bottom=0)
        drawn.legend(loc="outside lower center", ncols=3)
    return name
