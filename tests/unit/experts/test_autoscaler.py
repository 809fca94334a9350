"""What Serve's controller gets from the policy: a number, never an exception."""

import logging
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from tests.fakes import FakeClock
from tests.unit.experts.test_load_report import Serve, told

from expertmesh.experts.autoscaler import Autoscaler
from expertmesh.experts.live_config import GroupScaling
from expertmesh.experts.load_report import ReplicaReport, rule_as_numbers
from expertmesh.experts.scaling import Override
from expertmesh.experts.scaling_policy import ScalingPolicy
from expertmesh.v1 import control_pb2 as pb

ON = GroupScaling(mode="on", max_replicas=4, within_machines=False)


@dataclass
class Desk:
    """Keeps what it is told."""

    override: Override | None = None
    more_by_gpus: int | None = None
    told: list[pb.GroupScaling] = field(default_factory=list)

    def tell(self, decision: pb.GroupScaling) -> None:
        self.told.append(decision)


@dataclass
class Context:
    """Of a group with one replica."""

    raw_metrics: Serve = field(default_factory=dict)
    target_num_replicas: int = 1
    config: Any = field(default_factory=lambda: SimpleNamespace(metrics_interval_s=0.5))


class Group:
    """One replica that is busy as told, and its autoscaler."""

    def __init__(self, rule: GroupScaling) -> None:
        self.rule = rule
        self.clock = FakeClock()
        self.desk = Desk()
        self.context = Context()
        self.scaler = Autoscaler("g0", self.desk, self.clock)
        self._busy_s = 0.0

    def run(self, seconds: float, busy_frac: float) -> int:
        """What Serve was told last."""
        replicas = 0
        for _ in range(int(seconds / 0.5)):
            self.clock.advance(0.5)
            self._busy_s += 0.5 * busy_frac
            report = ReplicaReport(self.clock(), busy_s=self._busy_s)
            told(self.context.raw_metrics, "a", self.clock(), report.numbers())
            told(self.context.raw_metrics, "a", self.clock(), rule_as_numbers(self.rule))
            replicas = self.scaler.replicas(self.context)
        return replicas


def test_serve_keeps_what_it_has_until_somebody_reports() -> None:
    group = Group(ON)
    assert group.scaler.replicas(Context(target_num_replicas=3)) == 3
    assert not group.desk.told


def test_a_busy_replica_gets_company() -> None:
    group = Group(ON)
    assert group.run(3, 0.5) == 1
    assert group.run(3, 1.0) == 2
    newest = group.desk.told[-1]
    assert (newest.group, newest.mode, newest.wanted) == ("g0", pb.SCALING_MODE_ON, 2)
    assert (newest.reason, newest.max_replicas) == ("load", 4)
    assert "each to be 70% busy" in newest.text


def test_advice_is_told_and_not_followed() -> None:
    group = Group(ON.model_copy(update={"mode": "advisory"}))
    assert group.run(3, 1.0) == 1
    newest = group.desk.told[-1]
    assert (newest.mode, newest.wanted) == (pb.SCALING_MODE_ADVISORY, 2)


def test_a_rule_that_changes_is_followed_at_once() -> None:
    group = Group(ON)
    assert group.run(3, 1.0) == 2
    group.rule = ON.model_copy(update={"max_replicas": 1})
    assert group.run(1, 1.0) == 1


def test_free_gpus_are_a_bound() -> None:
    group = Group(ON.model_copy(update={"within_machines": True, "target_busy_frac": 0.2}))
    group.desk.more_by_gpus = 1
    assert group.run(3, 1.0) == 2
    assert "memory and devices have room for 2" in group.desk.told[-1].text
    group.desk.more_by_gpus = 9
    assert group.run(3, 1.0) == 4


def test_a_number_set_by_hand_is_followed_and_shown() -> None:
    group = Group(ON)
    group.run(3, 0.1)
    group.desk.override = Override(3, group.clock() + 60)
    assert group.scaler.replicas(group.context) == 3
    newest = group.desk.told[-1]
    assert (newest.reason, newest.override.replicas) == ("override", 3)
    assert 59_000 < newest.override.left_ms <= 60_000
    assert group.run(61, 0.1) == 1


def test_silence_is_told() -> None:
    group = Group(ON)
    group.run(3, 0.5)
    group.clock.advance(20)
    assert group.scaler.replicas(group.context) == 1
    assert group.desk.told[-1].reason == "stale"


def test_a_failure_keeps_the_replicas_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    group = Group(ON)
    assert group.run(3, 1.0) == 2
    told(group.context.raw_metrics, "a", group.clock() + 1, {"scaling.of_tomorrow": 1.0})
    group.context.target_num_replicas = 2
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            assert group.scaler.replicas(group.context) == 2
    newest = group.desk.told[-1]
    assert (newest.reason, newest.wanted) == ("failed", 2)
    assert "of_tomorrow: no such field" in newest.text
    assert len(caplog.records) == 1, "said once, not ten times a second"


def test_a_policy_that_cannot_even_start_keeps_the_replicas(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = ScalingPolicy(group="g0", mesh="m", redis_url="nonsense://")
    context = Context(target_num_replicas=2)
    assert policy(context) == (2, {})
    assert policy(context) == (2, {})
    assert [record.message for record in caplog.records] == [
        "no scaling; the replicas there are stay"
    ]
