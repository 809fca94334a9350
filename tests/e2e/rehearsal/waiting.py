"""Bounded waits that say what did not come."""

import time
from collections.abc import Callable
from typing import TypeVar

_POLL_S = 0.1
T = TypeVar("T")


class DidNotComeError(Exception):
    """What was waited for, for how long, and what there was instead."""


def until(
    what: str, within_s: float, found: Callable[[], T], instead: Callable[[], object] = lambda: ""
) -> T:
    """The first true value of `found`.

    Raises:
        DidNotComeError: there was none within the time.
    """
    deadline_s = time.monotonic() + within_s
    while not (value := found()):
        if time.monotonic() > deadline_s:
            raise DidNotComeError(f"{what}: not within {within_s:g} s; instead: {instead()}")
        time.sleep(_POLL_S)
    return value
