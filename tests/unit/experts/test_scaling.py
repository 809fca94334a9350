"""The rule of scaling: how many replicas, and why."""

import pytest
from tests.unit.experts.load_traces import Group, decision, history, sample

from expertmesh.experts.load_history import GroupSample, LoadHistory
from expertmesh.experts.scaling import STALE_S, Override, decide
from expertmesh.experts.scaling_options import ScalingOptions
from expertmesh.runtime.config import validate
from expertmesh.runtime.errors import ConfigError

OPTIONS = ScalingOptions(max_replicas=8)


def test_load_above_the_target_asks_for_as_many_as_it_takes() -> None:
    made = decision(history([2.1] * 10, ready=3), OPTIONS)
    assert (made.wanted, made.reason) == (3, "steady")
    made = decision(history([2.2] * 10, ready=3), OPTIONS)
    assert (made.wanted, made.reason) == (4, "load")
    assert "load of 2.20 replicas, each to be 70% busy" in made.text


def test_work_that_waits_counts_as_load() -> None:
    """One replica can show no more than one busy; what comes and is not done is the rest."""
    overloaded = history([1.0] * 10, arrival_rows_per_s=2800.0)
    assert decision(overloaded, OPTIONS).wanted == 4


def test_rates_of_a_moment_do_not_ask_for_everything() -> None:
    absurd = history([1.0] * 10, arrival_rows_per_s=1e9)
    assert decision(absurd, ScalingOptions(max_replicas=1000)).wanted == 6


def test_a_backlog_asks_for_what_works_it_off_in_time() -> None:
    """25 s of work beside a load of 1.2: in 10 s that takes 3.7 replicas, always busy."""
    made = decision(history([1.2] * 10, ready=2, queued_rows=25_000.0), OPTIONS)
    assert (made.wanted, made.reason) == (4, "backlog")
    assert "25000 rows wait" in made.text


def test_rows_that_wait_for_a_group_that_is_not_busy_ask_for_one_more() -> None:
    made = decision(history([0.6] * 10, ready=2, queue_delay_s=0.08), OPTIONS)
    assert (made.wanted, made.reason) == (3, "delay")
    made = decision(history([0.6] * 10, ready=2, queue_delay_s=0.04), OPTIONS)
    assert (made.wanted, made.reason) == (2, "steady")


def test_what_waited_before_the_newest_replica_was_ready_does_not_count() -> None:
    past = history([0.6] * 10, ready=2, queue_delay_s=0.08)
    past.add(sample(past.newest.at_s + 0.5, 0.6, 3, queue_delay_s=0.08))
    assert decision(past, OPTIONS).wanted == 3


def test_replicas_that_are_starting_are_coming_and_not_capacity() -> None:
    """2.8 replicas of load take four; two are ready, two on their way: nothing more is asked for,
    and the two are not taken for four."""
    past = history([2.0] * 10, ready=2, arrival_rows_per_s=2800.0, starting=2)
    made = decision(past, OPTIONS)
    assert (made.wanted, made.present, made.ready) == (4, 4, 2)
    past = history([2.0] * 10, ready=2, arrival_rows_per_s=2800.0, starting=1)
    assert decision(past, OPTIONS).wanted == 4


def test_fewer_only_after_a_calm_window() -> None:
    options = ScalingOptions(max_replicas=8, down_window_s=20.0)
    assert decision(history([0.5] * 39, ready=3), options).wanted == 3
    made = decision(history([0.5] * 41, ready=3), options)
    assert (made.wanted, made.reason) == (1, "calm")
    assert "for 20 s a load of at most 0.50 replicas" in made.text


@pytest.mark.parametrize("step_s", [0.3, 0.5, 7.0])
def test_the_longest_window_is_seen_whole_for_ever(step_s: float) -> None:
    options = ScalingOptions(
        down_window_s=60.0, trend_window_s=6.0, memory_s=6.0, zero_after_s=60.0
    )
    past = LoadHistory.of(options)
    for step in range(300):
        past.add(sample(step * step_s, 0.5, 3))
        if step * step_s > 61:
            assert decision(past, options).wanted == 1


def test_a_peak_within_the_window_keeps_the_replicas_it_needed() -> None:
    options = ScalingOptions(max_replicas=8, down_window_s=20.0)
    loads = [0.5] * 30 + [1.0] * 8 + [0.5] * 20
    assert decision(history(loads, ready=3), options).wanted == 2
    assert decision(history([*loads, *[0.5] * 30], ready=3), options).wanted == 1


def test_waiting_rows_are_not_calm() -> None:
    options = ScalingOptions(max_replicas=8, down_window_s=20.0)
    past = history([0.5] * 60, ready=3)
    for step in range(8):
        past.add(sample(past.newest.at_s + 0.5, 0.5, 3, queue_delay_s=0.06 if step < 4 else 0.0))
    assert decision(past, options).wanted == 3


def test_what_came_lately_stays_for_a_window() -> None:
    """What asked for it may have been over before it could be seen in the means."""
    options = ScalingOptions(max_replicas=8, down_window_s=20.0)
    past = history([0.3] * 100)
    for step in range(1, 80):
        past.add(sample(past.newest.at_s + 0.5, 0.3, 1 if step < 10 else 2, starting=step < 10))
        made = decision(past, options)
        if step < 36:
            assert (made.wanted, made.reason) == (2, "steady")
    assert (made.wanted, made.reason) == (1, "calm")


def test_what_an_overload_left_with_one_replica_says_nothing_of_the_number() -> None:
    """New replicas idle while the old one works off what it had admitted."""
    options = ScalingOptions(max_replicas=8, down_window_s=20.0, catch_up_s=100.0)
    left = {"busy": 1.2, "busiest": 1.0, "queue_delay_s": 9.0, "done_rows_per_s": 1200.0}
    past = LoadHistory.of(options, (sample(n * 0.5, 0.3, 3, **left) for n in range(60)))
    assert decision(past, options).wanted == 3
    for _ in range(60):
        past.add(sample(past.newest.at_s + 0.5, 0.3, 3))
    assert decision(past, options).wanted == 1


def test_so_few_as_let_rows_wait_before_are_not_tried_again_soon() -> None:
    """Bursts: one replica is seldom busy, but rows wait; the third waits for nothing."""
    options = ScalingOptions(max_replicas=8, down_window_s=20.0, memory_s=100.0)

    def past(calm_s: float) -> LoadHistory:
        samples = [sample(n * 0.5, 0.3, 1, queue_delay_s=0.1) for n in range(10)]
        samples += [sample(5 + n * 0.5, 0.3, 3) for n in range(int(calm_s * 2))]
        return LoadHistory.of(options, samples)

    assert decision(past(40), options).wanted == 2
    assert decision(past(110), options).wanted == 1


def test_a_trend_is_met_before_it_is_there() -> None:
    options = ScalingOptions(max_replicas=8, lead_s=10.0)
    rising = [0.399 + 0.02 * n * 0.5 for n in range(120)]  # 0.02 replicas more each second
    made = decision(history(rising, ready=3), options)
    assert made.demand == pytest.approx(1.575, abs=0.01)
    assert made.expected == pytest.approx(1.775, abs=0.01)
    made = decision(history(rising, ready=2), ScalingOptions(lead_s=0, target_busy_frac=0.8))
    assert made.wanted == 2
    made = decision(history(rising, ready=2), ScalingOptions(lead_s=10, target_busy_frac=0.8))
    assert (made.wanted, made.reason) == (3, "trend")
    assert "rising to 1.77 in 10 s" in made.text


def test_a_step_is_no_trend_for_long() -> None:
    """Twelve seconds after a step a line through a minute rises still, arrivals do not."""
    options = ScalingOptions(max_replicas=8, lead_s=10.0)
    made = decision(history([0.4] * 96 + [2.0] * 24, ready=3), options)
    assert made.expected == pytest.approx(2.0)


def test_a_hand_overrules_the_load_until_it_expires() -> None:
    past = history([0.5] * 10, ready=1)
    made = decision(past, OPTIONS, override=Override(3, until_s=100.0))
    assert (made.wanted, made.reason) == (3, "override")
    assert "set by hand" in made.text
    assert decision(past, OPTIONS, override=Override(3, until_s=1.0)).wanted == 1


def test_no_news_is_no_reason_to_change_anything() -> None:
    past = history([5.0] * 10, ready=2)
    made = decide(past, OPTIONS, now_s=past.newest.at_s + STALE_S + 1)
    assert (made.wanted, made.reason) == (2, "stale")


def test_bounds_hold_and_are_named() -> None:
    made = decision(history([50.0] * 10, ready=20), OPTIONS)
    assert made.wanted == 8
    assert "max_replicas 8" in made.text
    made = decision(history([2.0] * 10, ready=2), OPTIONS, room=2)
    assert made.wanted == 2
    assert "memory and devices have room for 2" in made.text
    made = decision(history([0.1] * 10, ready=1), ScalingOptions(min_replicas=2))
    assert (made.wanted, made.reason) == (2, "bounds")
    assert decision(history([0.1] * 10), ScalingOptions(min_replicas=2), room=1).wanted == 2


def test_to_zero_only_when_allowed_cold_and_others_can_serve() -> None:
    options = ScalingOptions(min_replicas=0, zero_after_s=10.0, down_window_s=5.0)
    cold = history([0.0] * 30)
    made = decision(cold, options, has_fallback=True)
    assert (made.wanted, made.reason) == (0, "idle")
    assert decision(cold, options).wanted == 1
    assert decision(history([0.0] * 15), options, has_fallback=True).wanted == 1
    assert decision(history([0.0] * 29 + [0.01]), options, has_fallback=True).wanted == 1
    one = ScalingOptions(min_replicas=1, zero_after_s=10.0, down_window_s=5.0)
    assert decision(cold, one, has_fallback=True).wanted == 1


def test_from_zero_as_soon_as_rows_come() -> None:
    options = ScalingOptions(min_replicas=0, max_replicas=8)
    none = LoadHistory(2.0, 600.0, [GroupSample(1.0, 0, 0.0, 0.0, 0.0)])
    assert decision(none, options, has_fallback=True).wanted == 0
    none.add(GroupSample(1.5, 0, 0.0, arrival_rows_per_s=3000, done_rows_per_s=0, row_s=0.001))
    made = decision(none, options, has_fallback=True)
    assert (made.wanted, made.reason) == (3, "woken")
    none.add(GroupSample(2.0, 0, 0.0, arrival_rows_per_s=3000, done_rows_per_s=0, starting=3))
    assert decision(none, options, has_fallback=True).wanted == 3


def test_up_in_seconds_down_after_the_window() -> None:
    """The bar's step: 1x, 6x, 1x, with replicas that take four seconds to start."""
    options = ScalingOptions(max_replicas=4, down_window_s=20.0)
    group = Group(options, start_s=4.0)
    group.run(30, lambda _: 0.35)
    assert set(group.wanted) == {1}
    group.run(40, lambda _: 2.1)
    step = group.wanted[60:]
    assert step[: 2 * 2].count(1) < 4, "more are wanted within two seconds"
    assert step[-1] == 3
    group.run(30, lambda _: 0.35)
    down = group.wanted[140:]
    assert down[: 2 * 18] == [down[0]] * 36
    assert down[-1] == 1
    assert group.waiting == 0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"min_replicas": 5, "max_replicas": 4}, "min_replicas 5 is above max_replicas 4"),
        ({"up_window_s": 5, "down_window_s": 2}, "up_window_s 5 is above down_window_s 2"),
        ({"target_busy_frac": 1.0}, "target_busy_frac"),
        ({"max_replicas": 0}, "max_replicas"),
        ({"min_replica": 1}, "min_replica: no such field"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    fields: dict[str, float], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        validate(ScalingOptions, fields)


def test_samples_come_in_order() -> None:
    past = history([0.5] * 3)
    with pytest.raises(ValueError, match="not after"):
        past.add(sample(0.2, 0.5))
