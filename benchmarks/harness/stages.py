"""Where the time of one layer call goes: clock readings at the seams of the router.

The seams are wrapped from outside while this measures: the product carries no clocks for it.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from expertmesh.router import core, live_mesh
from expertmesh.router.legs import Leg
from expertmesh.runtime import wire

_SEAMS: tuple[tuple[Any, str, str, bool], ...] = (
    (core, "check_routing", "the router's loop has the call", False),
    (core, "slots_of_call", "the rows are sorted by expert (select)", True),
    (live_mesh, "plan", "the replicas are chosen (plan)", True),
    (Leg, "send", "all messages are encoded and queued (encode)", True),
    (wire, "decode", "the last answer is in (send, queue, batch, compute)", False),
    (Leg, "file", "all rows are filed (decode)", True),
    (core, "combine", "the rows are combined (combine)", True),
)
FIRST_ANSWER = "the first answer is in"
COMPUTE = "(of it, a replica's own compute)"
QUEUE = "(of it, a replica's queue)"
RETURNED = "the model's thread goes on"


def stage_times_us(call: Callable[[], object], calls: int) -> dict[str, float]:
    """Median microseconds from the start of a call to each seam, in order; the last of several."""
    marks: dict[str, list[float]] = {}
    seen: dict[str, list[float]] = {}
    with ExitStack() as stack:
        for owner, name, what, after in _SEAMS:
            stack.enter_context(_marked(owner, name, what, after, marks))
        stack.enter_context(_answers(seen))
        for _ in range(calls):
            marks.clear()
            started_s = time.perf_counter()
            call()
            marks[RETURNED] = [time.perf_counter()]
            for what, times_s in marks.items():
                seen.setdefault(what, []).append(1e6 * (times_s[-1] - started_s))
            first_s = marks[_SEAMS[4][2]][0]
            seen.setdefault(FIRST_ANSWER, []).append(1e6 * (first_s - started_s))
    medians = {what: statistics.median(values) for what, values in seen.items()}
    return dict(sorted(medians.items(), key=lambda item: (item[0].startswith("("), item[1])))


@contextmanager
def _marked(
    owner: Any, name: str, what: str, after: bool, marks: dict[str, list[float]]
) -> Iterator[None]:
    original = getattr(owner, name)

    def marked(*args: Any, **kwargs: Any) -> Any:
        if not after:
            marks.setdefault(what, []).append(time.perf_counter())
        result = original(*args, **kwargs)
        if after:
            marks.setdefault(what, []).append(time.perf_counter())
        return result

    with patch.object(owner, name, marked):
        yield


@contextmanager
def _answers(seen: dict[str, list[float]]) -> Iterator[None]:
    """Keeps what the replicas say of their own times."""
    original = Leg.file

    def filed(self: Leg, answer: Any, form: Any) -> None:
        seen.setdefault(COMPUTE, []).append(answer[0].compute_us)
        seen.setdefault(QUEUE, []).append(answer[0].queue_us)
        original(self, answer, form)

    with patch.object(Leg, "file", filed):
        yield
