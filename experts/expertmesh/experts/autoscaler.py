"""Applies the rule of scaling to one expert group, inside of Serve's controller.

Called about ten times a second from the loop that runs the whole of Serve: it does no I/O, and it
raises nothing, whatever happens.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from expertmesh.experts.live_config import GroupScaling
from expertmesh.experts.load_history import LoadHistory
from expertmesh.experts.load_report import LoadCollector, Series, room, rule_of
from expertmesh.experts.scaling import Decision, Override, decide
from expertmesh.v1 import control_pb2 as pb

_log = logging.getLogger(__name__)

_MODES = {"advisory": pb.SCALING_MODE_ADVISORY, "on": pb.SCALING_MODE_ON}
_SAME_AGAIN_S = 60.0
_AT_LEAST_EVERY_S = 1.0
"""Without news, so that people see that there is none."""


class Context(Protocol):
    """What is used of Serve's AutoscalingContext."""

    @property
    def target_num_replicas(self) -> int:
        """Replicas that Serve has or is about to have."""

    @property
    def raw_metrics(self) -> Series:
        """What the running replicas have reported lately."""

    @property
    def config(self) -> Any:
        """The AutoscalingConfig."""


class Desk(Protocol):
    """Where decisions go and orders come from: `ScalingDesk`."""

    @property
    def override(self) -> Override | None:
        """The number set by hand."""

    @property
    def more_by_gpus(self) -> int | None:
        """Replicas that free GPUs would do for; None where replicas need none."""

    def tell(self, decision: pb.GroupScaling) -> None:
        """Have the decision told."""


class Autoscaler:
    """One group's.

    Args:
        clock: seconds, monotonic; of the desk's overrides, too.
    """

    def __init__(self, group: str, desk: Desk, clock: Callable[[], float] = time.monotonic) -> None:
        self._group = group
        self._desk = desk
        self._clock = clock
        self._rule: GroupScaling | None = None
        self._collector: LoadCollector | None = None
        self._history: LoadHistory | None = None
        self._override: Override | None = None
        self._wanted: int | None = None
        self._decided_s = float("-inf")
        self._logged: tuple[str, float] = ("", float("-inf"))

    def replicas(self, context: Context) -> int:
        """How many replicas Serve should have; those it has if nothing better is known."""
        try:
            return self._replicas(context)
        except Exception as error:
            self._failed(error, context.target_num_replicas)
            return context.target_num_replicas

    def _replicas(self, context: Context) -> int:
        now_s, target = self._clock(), context.target_num_replicas
        series = context.raw_metrics
        rule = rule_of(series) or self._rule
        if rule is None:  # nobody has reported yet
            return target
        collector, history = self._kept(rule, context)
        if sample := collector.take(series, target, now_s):
            history.add(sample)
        override = self._desk.override
        if sample or override != self._override or now_s >= self._decided_s + _AT_LEAST_EVERY_S:
            self._override, self._decided_s = override, now_s
            self._decide(rule, history, collector, target, now_s)
        return self._wanted if rule.mode == "on" and self._wanted is not None else target

    def _kept(self, rule: GroupScaling, context: Context) -> tuple[LoadCollector, LoadHistory]:
        """The history goes on when the rule changes, unless its spans do."""
        if self._collector is None:
            self._collector = LoadCollector(context.config.metrics_interval_s)
        before, self._rule = self._rule, rule
        span_s = (rule.up_window_s, rule.history_s)
        if self._history is None or (before and (before.up_window_s, before.history_s) != span_s):
            self._history = LoadHistory.of(rule)
        return self._collector, self._history

    def _decide(
        self,
        rule: GroupScaling,
        history: LoadHistory,
        collector: LoadCollector,
        target: int,
        now_s: float,
    ) -> None:
        if not len(history.recent):
            return
        most = None
        if rule.within_machines:
            most = room(collector.reports, target, self._desk.more_by_gpus)
        made = decide(history, rule, now_s=now_s, room=most, override=self._override)
        if made.wanted not in (self._wanted, made.present):
            _log.info("scaling of %s (%s): %d, %s", self._group, rule.mode, made.wanted, made.text)
        self._wanted = made.wanted
        self._desk.tell(self._record(made, rule, now_s))

    def _record(self, made: Decision, rule: GroupScaling, now_s: float) -> pb.GroupScaling:
        record = pb.GroupScaling(
            group=self._group,
            mode=_MODES[rule.mode],
            wanted=made.wanted,
            present=made.present,
            ready=made.ready,
            reason=made.reason,
            text=made.text,
            demand=made.demand,
            expected_demand=made.expected,
            queue_time_us=made.delay_s * 1e6,
            min_replicas=rule.min_replicas,
            max_replicas=rule.max_replicas,
        )
        if self._override and self._override.until_s > now_s:
            left_ms = int((self._override.until_s - now_s) * 1e3)
            record.override.CopyFrom(
                pb.ReplicaOverride(replicas=self._override.replicas, left_ms=left_ms)
            )
        return record

    def _failed(self, error: Exception, target: int) -> None:
        """Say so, where people look and in Serve's log, there once a minute."""
        text = f"{type(error).__name__}: {error}; the {target} replicas there are stay"
        now_s = self._clock()
        logged, at_s = self._logged
        if text != logged or now_s > at_s + _SAME_AGAIN_S:
            _log.error("scaling of %s failed: %s", self._group, text, exc_info=error)
            self._logged = text, now_s
        self._wanted = None
        failed = pb.GroupScaling(group=self._group, wanted=target, present=target, text=text)
        failed.reason = "failed"
        failed.mode = _MODES[self._rule.mode] if self._rule else pb.SCALING_MODE_ADVISORY
        self._desk.tell(failed)
