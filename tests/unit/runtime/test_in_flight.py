"""Calls worked on at the same time: two bounds, and room for whoever comes next."""

from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes import FakeClock

from expertmesh.runtime.errors import QueueFull
from expertmesh.runtime.in_flight import InFlight


def fill(calls: InFlight, caller: str, num_bytes: int = 0, stack: ExitStack | None = None) -> int:
    """How many calls of a caller are admitted until one is refused."""
    stack = stack or ExitStack()
    count = 0
    while True:
        try:
            stack.enter_context(calls.admit(caller, num_bytes))
        except QueueFull:
            return count
        count += 1


def test_one_caller_gets_half_two_a_third_and_the_next_finds_a_place() -> None:
    calls = InFlight(64, 1000, FakeClock())
    stack = ExitStack()
    assert fill(calls, "a", stack=stack) == 32
    assert fill(calls, "b", stack=stack) == 16
    assert fill(calls, "c", stack=stack) == 8
    assert calls.num_calls == 56
    stack.close()
    assert (calls.num_calls, calls.num_bytes) == (0, 0)
    assert fill(calls, "a") == 32


def test_bytes_are_shared_alike() -> None:
    calls = InFlight(64, 100, FakeClock())
    stack = ExitStack()
    assert fill(calls, "a", 10, stack) == 5
    assert fill(calls, "b", 10, stack) == 2
    assert calls.num_bytes == 70


def test_a_call_alone_is_always_admitted() -> None:
    calls = InFlight(1, 1, FakeClock())
    with (
        calls.admit("a", 1000),
        pytest.raises(QueueFull, match="of 1 at most"),
        calls.admit("b", 0),
    ):
        pass
    with calls.admit("b", 1000):
        pass


def test_who_is_refused_is_told_how_long_calls_take() -> None:
    clock = FakeClock()
    calls = InFlight(2, 100, clock)
    for _ in range(100):
        with calls.admit("a", 1):
            clock.advance(0.2)
    with (
        calls.admit("a", 1),
        calls.admit("b", 1),
        pytest.raises(QueueFull) as caught,
        calls.admit("c", 1),
    ):
        pass
    assert caught.value.retry_after_s == pytest.approx(0.2, rel=0.01)
    assert caught.value.fields == {"max_calls": "2", "calls": "3"}


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 50), st.booleans()), max_size=60),
    st.integers(1, 20),
    st.integers(1, 200),
)
def test_the_bounds_are_kept(
    asked: list[tuple[str, int, bool]], max_calls: int, max_bytes: int
) -> None:
    calls = InFlight(max_calls, max_bytes, FakeClock())
    held: list[tuple[ExitStack, int]] = []
    for caller, num_bytes, ends in asked:
        stack = ExitStack()
        try:
            stack.enter_context(calls.admit(caller, num_bytes))
            held.append((stack, num_bytes))
        except QueueFull:
            pass
        if ends and held:
            held.pop(0)[0].close()
        assert calls.num_calls == len(held) <= max_calls
        assert calls.num_bytes == sum(own for _, own in held)
