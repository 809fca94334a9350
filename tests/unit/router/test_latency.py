"""When an answer is late, and how often a second copy may be asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.router.failover import FailoverSettings, HedgeBudget
from expertmesh.router.latency import LEAST, WINDOW, Latencies


def test_nothing_is_late_before_enough_is_known() -> None:
    known = Latencies()
    for _ in range(LEAST - 1):
        known.observe(4, 0.01)
    assert known.late_s(4) is None
    known.observe(4, 0.01)
    assert known.late_s(4) == pytest.approx(0.02), "two medians, where all take alike"


def test_late_is_beyond_the_95th_percentile_of_that_size() -> None:
    known = Latencies()
    for number in range(WINDOW):
        known.observe(4, 0.01 if number % 10 else 0.2)
        known.observe(900, 3.0)
    assert known.late_s(5) == pytest.approx(0.2)
    assert known.late_s(1000) == pytest.approx(6.0)
    assert known.late_s(64) is None


def test_the_oldest_times_are_forgotten() -> None:
    known = Latencies()
    for time_s in [5.0] * WINDOW + [0.01] * WINDOW:
        known.observe(1, time_s)
    assert known.late_s(1) == pytest.approx(0.02)


@given(st.lists(st.floats(1e-5, 10), min_size=LEAST, max_size=3 * WINDOW))
def test_at_most_a_tenth_of_what_was_seen_is_late(times_s: list[float]) -> None:
    known = Latencies()
    for time_s in times_s:
        known.observe(1, time_s)
    late_s = known.late_s(1)
    assert late_s is not None
    assert late_s >= 1e-3


@given(st.lists(st.integers(1, 8), max_size=400), st.floats(0.01, 0.5), st.integers(1, 20))
def test_hedges_stay_within_their_share(sizes: list[int], frac: float, burst: int) -> None:
    budget = HedgeBudget(FailoverSettings(hedge_frac=frac, hedge_burst=burst))
    sent = hedged = 0
    for size in sizes:
        budget.earn(size)
        sent += size
        hedged += size * budget.spend(size)
        assert hedged <= burst + frac * sent + 1e-6


def test_no_share_is_no_hedge_at_all() -> None:
    budget = HedgeBudget(FailoverSettings(hedge_frac=0))
    budget.earn(1000)
    assert not budget.spend(1)
