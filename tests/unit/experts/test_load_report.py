"""What replicas tell of their load, and the samples and the rule made of it."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from expertmesh.experts.live_config import GroupScaling, LiveConfig
from expertmesh.experts.load_report import (
    SILENT_S,
    LoadCollector,
    ReplicaReport,
    room,
    rule_as_numbers,
    rule_of,
)
from expertmesh.runtime.config import validate
from expertmesh.runtime.errors import ConfigError


@dataclass(frozen=True)
class Point:
    timestamp: float
    value: float


Serve = dict[str, dict[Any, list[Point]]]


def told(series: Serve, replica: str, at_s: float, numbers: dict[str, float]) -> None:
    """As Serve keeps what `record_autoscaling_stats` returned."""
    for name, value in numbers.items():
        series.setdefault(name, {}).setdefault(replica, []).append(Point(at_s, value))


def report(at_s: float, **totals: float) -> ReplicaReport:
    return replace(ReplicaReport(at_s), **totals)


def series_of(**reports: list[ReplicaReport]) -> Serve:
    series: Serve = {}
    for replica, own in reports.items():
        for one in own:
            told(series, replica, one.at_s, one.numbers())
    return series


def test_rates_are_differences_of_totals() -> None:
    first = report(100.0, arrived_rows=50, done_rows=40, busy_s=3.0, waited_row_s=1.0)
    second = report(
        100.5,
        arrived_rows=150,
        done_rows=90,
        busy_s=3.4,
        waited_row_s=2.0,
        queued_rows=60,
        row_time_us=8000,
    )
    sample = LoadCollector(0.5).take(series_of(a=[first, second]), target=1, now_s=7.0)
    assert sample
    assert (sample.at_s, sample.ready, sample.starting) == (7.0, 1, 0)
    assert sample.busy == pytest.approx(0.8)
    assert sample.arrival_rows_per_s == 200
    assert sample.done_rows_per_s == 100
    assert sample.queue_delay_s == pytest.approx(1.0 / 50)
    assert sample.queued_rows == 60
    assert sample.row_s == pytest.approx(0.008)


def test_replicas_are_added_up_and_those_that_do_not_report_are_starting() -> None:
    series = series_of(
        a=[report(100.0), report(100.5, busy_s=0.5, done_rows=10, waited_row_s=0.1)],
        b=[report(3.0), report(3.5, busy_s=0.25, done_rows=30, waited_row_s=0.1)],
        new=[report(8.0)],  # one report is not a rate
    )
    sample = LoadCollector(0.5).take(series, target=4, now_s=0.0)
    assert sample
    assert (sample.ready, sample.starting) == (2, 2)
    assert sample.busy == pytest.approx(1.5)
    assert sample.queue_delay_s == pytest.approx(0.2 / 40)


def test_a_replica_busy_with_messages_is_busy() -> None:
    series = series_of(a=[report(1.0), report(2.0, busy_s=0.1, loop_s=0.9)])
    sample = LoadCollector(0.5).take(series, target=1, now_s=0.0)
    assert sample
    assert sample.busy == pytest.approx(0.9)


def test_rows_that_wait_behind_a_batch_without_end_wait() -> None:
    series = series_of(a=[report(1.0), report(2.0, busy_s=1.0, oldest_wait_s=0.7, queued_rows=5)])
    sample = LoadCollector(0.5).take(series, target=1, now_s=0.0)
    assert sample
    assert sample.queue_delay_s == pytest.approx(0.7)


def test_a_sample_needs_news_and_time() -> None:
    collector = LoadCollector(0.5)
    reports = [report(1.0), report(1.5)]
    assert collector.take(series_of(a=reports), 1, now_s=10.0)
    assert not collector.take(series_of(a=[*reports, report(2.0)]), 1, now_s=10.4), "too soon"
    assert collector.take(series_of(a=[*reports, report(2.0)]), 1, now_s=10.5)
    assert not collector.take(series_of(a=[*reports, report(2.0)]), 1, now_s=11.0), "no news"


def test_whoever_is_silent_or_gone_is_not_counted_on() -> None:
    collector = LoadCollector(0.5)
    old = [report(1.0), report(1.5)]
    assert collector.take(series_of(a=old, b=old), 2, now_s=10.0)
    sample = collector.take(series_of(a=old, b=[*old, report(4.0)]), 2, now_s=10.0 + SILENT_S + 0.1)
    assert sample
    assert (sample.ready, sample.starting) == (1, 1)
    sample = collector.take(series_of(b=[*old, report(4.0), report(5.0)]), 1, now_s=15.0)
    assert sample
    assert (sample.ready, sample.starting) == (1, 0)


def test_the_rule_rides_on_reports() -> None:
    rule = GroupScaling(mode="on", max_replicas=7, up_window_s=1.5, within_machines=False)
    series: Serve = {}
    assert rule_of(series) is None
    told(series, "a", 1.0, rule_as_numbers(GroupScaling(max_replicas=2)))
    told(series, "a", 2.0, rule_as_numbers(GroupScaling(max_replicas=3)))
    told(series, "b", 3.0, rule_as_numbers(rule))
    assert rule_of(series) == rule


def test_a_rule_of_another_version_is_refused_by_name() -> None:
    series: Serve = {}
    told(series, "a", 1.0, {"scaling.of_tomorrow": 1.0})
    with pytest.raises(ConfigError, match="of_tomorrow: no such field"):
        rule_of(series)


def test_memory_has_room_for_so_many() -> None:
    assert room([report(1.0)], 2) is None
    reports = [
        report(1.0, free_bytes=900, need_bytes=400),
        report(1.0, free_bytes=50, need_bytes=400),
    ]
    assert room(reports, 2) == 4
    assert room(reports[1:], 2) == 2
    assert room(reports, 2, more_by_gpus=1) == 3
    alone = [report(1.0)]
    assert room(alone, 1, more_by_gpus=1) == 2
    assert room(alone, 2, more_by_gpus=1) == 2, "the one that starts will take it"
    assert room(alone, 2, more_by_gpus=0) == 2
    assert room(alone, 2, more_by_gpus=5) == 6


def test_user_config_is_checked_whole() -> None:
    live = validate(LiveConfig, {"max_batch_rows": 8, "scaling": {"mode": "on", "max_replicas": 2}})
    assert live.limits.max_batch_rows == 8
    assert live.scaling == GroupScaling(mode="on", max_replicas=2)
    with pytest.raises(ConfigError, match=r"scaling.*min_replicas 3 is above max_replicas 2"):
        validate(LiveConfig, {"scaling": {"min_replicas": 3, "max_replicas": 2}})
