"""Limits of callers: nobody else pays for one who calls too much."""

from contextlib import ExitStack

import pytest

from expertmesh.runtime.errors import RateLimited
from expertmesh.runtime.security import limits
from expertmesh.runtime.security.limits import CallMeters
from expertmesh.runtime.security.settings import CallLimits


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def call(
    meters: CallMeters, clock: Clock, caller: str = "a", own: CallLimits | None = None
) -> None:
    """One call that takes no time."""
    with meters.running(caller, own, clock):
        pass


def test_a_burst_then_the_rate(clock: Clock) -> None:
    meters = CallMeters(CallLimits(calls_per_s=2, burst_calls=3))
    for _ in range(3):
        call(meters, clock)
    with pytest.raises(RateLimited, match="2 calls per second") as limited:
        call(meters, clock)
    assert limited.value.retry_after_s == 0.5
    assert limited.value.fields["caller"] == "a"
    clock.now_s += 0.5
    call(meters, clock)
    with pytest.raises(RateLimited):
        call(meters, clock)
    clock.now_s += 1000
    for _ in range(3):
        call(meters, clock)
    with pytest.raises(RateLimited):
        call(meters, clock)


def test_running_calls_are_counted_until_they_end(clock: Clock) -> None:
    meters = CallMeters(CallLimits(running_calls=2))
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(meters.running("a", None, clock))
        with pytest.raises(RateLimited, match="2 calls at the same time") as limited:
            call(meters, clock)
        assert limited.value.retry_after_s
        call(meters, clock, "another caller")
    call(meters, clock)


def test_a_failed_call_ends_too(clock: Clock) -> None:
    meters = CallMeters(CallLimits(running_calls=1))
    with pytest.raises(KeyError), meters.running("a", None, clock):
        raise KeyError
    call(meters, clock)


def test_the_delay_grows_with_the_length_of_calls(clock: Clock) -> None:
    meters = CallMeters(CallLimits(running_calls=1))
    for _ in range(50):
        with meters.running("a", None, clock):
            clock.now_s += 8
    with meters.running("a", None, clock), pytest.raises(RateLimited) as limited:
        call(meters, clock)
    assert limited.value.retry_after_s == pytest.approx(8, rel=0.01)


def test_limits_of_its_own_replace_the_default_and_may_change(clock: Clock) -> None:
    meters = CallMeters(CallLimits(calls_per_s=1, burst_calls=1))
    own = CallLimits()
    for _ in range(100):
        call(meters, clock, own=own)
    call(meters, clock, own=CallLimits(running_calls=1))
    call(meters, clock, "b")
    with pytest.raises(RateLimited):
        call(meters, clock, "b")


def test_no_limits_refuse_nobody(clock: Clock) -> None:
    meters = CallMeters(CallLimits())
    for _ in range(1000):
        call(meters, clock)


def test_callers_who_left_are_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_MAX_CALLERS", 10)
    meters = CallMeters(CallLimits(calls_per_s=1, burst_calls=1))
    with meters.running("stays", None, clock):
        for number in range(100):
            clock.now_s += 1.01
            call(meters, clock, f"caller {number}")
        assert "stays" in meters._meters
    assert len(meters._meters) <= 11


def test_a_caller_who_is_limited_is_not_forgotten(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_MAX_CALLERS", 2)
    meters = CallMeters(CallLimits(calls_per_s=1, burst_calls=1))
    call(meters, clock)
    for number in range(10):
        call(meters, clock, f"other {number}")
    with pytest.raises(RateLimited):
        call(meters, clock)
