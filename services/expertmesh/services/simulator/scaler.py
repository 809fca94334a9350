"""Looks at the groups' load from time to time and resizes them by the rule of the real system."""

from collections.abc import Callable

from expertmesh.experts.load_history import GroupSample, LoadHistory
from expertmesh.experts.scaling import Decision, decide
from expertmesh.services.simulator.fleet import Fleet, GroupMeter, Phase
from expertmesh.services.simulator.scenario import ScalingSettings

_EWMA_WEIGHT = 0.3


class Scaler:
    """One for the mesh.

    Args:
        queued_rows: rows of a group that wait now, by its number.
    """

    def __init__(
        self, settings: ScalingSettings, fleet: Fleet, queued_rows: Callable[[int], float]
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._queued_rows = queued_rows
        rule = settings.rule
        self._histories = [
            LoadHistory(rule.up_window_s, rule.history_s) for _ in range(fleet.num_groups)
        ]
        self._row_s = [0.0] * fleet.num_groups
        self._last_s = 0.0
        self.next_s = settings.decide_s
        self.changes = 0
        """Decisions that changed the number of replicas of a group."""

    def look(self, now_s: float) -> None:
        """Take samples, decide, and start or take away replicas."""
        self.next_s = now_s + self._settings.decide_s
        took_s, self._last_s = now_s - self._last_s, now_s
        meters, self._fleet.meters = self._fleet.meters, [GroupMeter() for _ in self._histories]
        if self._settings.policy == "static":
            return
        decisions = []
        for group, meter in enumerate(meters):
            self._histories[group].add(self._sample(group, meter, now_s, took_s))
            decisions.append(decide(self._histories[group], self._settings.rule, now_s=now_s))
        self._apply(decisions, now_s)

    def _apply(self, decisions: list[Decision], now_s: float) -> None:
        most = max(decision.wanted for decision in decisions)
        is_whole = self._settings.policy == "whole"
        for group, decision in enumerate(decisions):
            wanted = most if is_whole else decision.wanted
            self.changes += wanted != self._fleet.present(group)
            self._fleet.resize(group, wanted, now_s)

    def _sample(self, group: int, meter: GroupMeter, now_s: float, took_s: float) -> GroupSample:
        fleet = self._fleet
        ready = len(fleet.ready(group))
        if meter.done_rows:
            row_s = meter.busy_s / meter.done_rows
            known = self._row_s[group]
            self._row_s[group] = known + _EWMA_WEIGHT * (row_s - known) if known else row_s
        return GroupSample(
            at_s=now_s,
            ready=ready,
            busy=min(float(ready), meter.busy_s / took_s),
            arrival_rows_per_s=meter.came_rows / took_s,
            done_rows_per_s=meter.done_rows / took_s,
            queued_rows=self._queued_rows(group),
            queue_delay_s=meter.waited_row_s / meter.started_rows if meter.started_rows else 0.0,
            row_s=self._row_s[group],
            starting=len(fleet.members(group, Phase.STARTING)),
        )
