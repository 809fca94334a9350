"""A minute of three times too much work for one replica, in simulated time: no machine is too slow.

The replica knows its costs from what it has computed; the device takes up to a fifth more or less.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from tests.fakes import FakeClock
from tests.unit.experts.gated_batcher import rows_of

from expertmesh.experts.limits import BatchLimits
from expertmesh.experts.load_stats import LoadStats
from expertmesh.experts.work import Work
from expertmesh.experts.work_queue import WorkQueue
from expertmesh.runtime.errors import QueueFull
from expertmesh.runtime.origin import Origin, Priority

BATCH_S, EXPERT_S, ROW_S = 0.001, 0.0005, 0.002
CALL_ROWS = 16
DEADLINE_S = 0.5
SECONDS = 60.0
FULL_PER_S = 1 / (CALL_ROWS * ROW_S)
"""Calls a second if rows were all that costs."""


@dataclass
class Simulated:
    """One replica, its device and its callers."""

    speed: float = 1.0
    """Of the device; may change while it runs."""
    clock: FakeClock = field(default_factory=FakeClock)
    stats: LoadStats = field(default_factory=LoadStats)
    good: Counter[str] = field(default_factory=Counter)
    late: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    worst_overrun: float = 0.0
    """Of the works that were computed, in deadlines."""

    def __post_init__(self) -> None:
        self.random = random.Random(3)
        self.queue = WorkQueue(BatchLimits(), self.stats, self.clock, merge=True)
        for rows in (1, 4, 32, 1, 4, 32, 8, 16):
            self.stats.fit.observe(2, rows, 1e6 * (BATCH_S + 2 * EXPERT_S + rows * ROW_S))

    def arrive(self, origin: Origin, deadline_s: float) -> Work | None:
        """A call, admitted or not."""
        first = self.random.randrange(7)
        rows = rows_of({first: CALL_ROWS // 2, first + 1: CALL_ROWS // 2})
        try:
            return self.queue.add(rows, origin, deadline_s, alone=False)
        except QueueFull:
            self.refused[origin.caller] += 1
            return None

    def start(self) -> tuple[list[Work], float]:
        """The next batch and when it will be done."""
        batch = self.queue.take()
        experts = len({e for work in batch for e in work.rows.experts})
        num_rows = sum(work.num_rows for work in batch)
        took_s = (BATCH_S + experts * EXPERT_S + num_rows * ROW_S) / self.speed
        took_s *= self.random.uniform(0.8, 1.2)
        return batch, self.clock() + took_s

    def done(self, batch: list[Work], began_s: float) -> None:
        """The batch is computed."""
        now_s = self.clock()
        experts = len({e for work in batch for e in work.rows.experts})
        num_rows = sum(work.num_rows for work in batch)
        fitted_s = self.stats.fitted_s(1, experts, num_rows)
        self.stats.observe_wall(fitted_s, now_s - began_s)
        self.stats.fit.observe(experts, num_rows, 1e6 * (now_s - began_s))
        self.queue.busy_until_s = 0.0
        for work in batch:
            assert work.deadline_s is not None
            overrun = (now_s - work.deadline_s) / DEADLINE_S
            self.worst_overrun = max(self.worst_overrun, overrun)
            (self.good if overrun <= 0 else self.late)[work.origin.caller] += 1
            self.queue.answered(work)

    def run(self, per_s: dict[Origin, float], seconds: float) -> float:
        """Offer calls at random times. Returns good answers a second."""
        before = sum(self.good.values())
        end_s = self.clock() + seconds
        due = {own: self.clock() + self.random.expovariate(rate) for own, rate in per_s.items()}
        waiting: list[Work] = []
        batch: list[Work] = []
        began_s = ready_s = 0.0
        while self.clock() < end_s:
            origin = min(due, key=lambda own: due[own])
            if batch and ready_s <= due[origin]:
                self.clock.now_s = ready_s
                self.done(batch, began_s)
                batch = []
            else:
                self.clock.now_s = due[origin]
                due[origin] += self.random.expovariate(per_s[origin])
                if work := self.arrive(origin, DEADLINE_S):
                    waiting.append(work)
            if not batch and self.queue:
                began_s = self.clock()
                batch, ready_s = self.start()
            waiting = [work for work in waiting if not self._left(work)]
        if batch:
            self.clock.now_s = max(self.clock.now_s, ready_s)
            self.done(batch, began_s)
        return (sum(self.good.values()) - before) / seconds

    def _left(self, work: Work) -> bool:
        """Whether its end is known: failed in the queue, or in a batch."""
        if work.answer.done() and work.answer.exception():
            self.late[work.origin.caller] += 1
            self.queue.answered(work)
            return True
        return not work.number


EQUAL = [Origin(name) for name in "abcd"]


def at(times: float) -> dict[Origin, float]:
    """So many times what the device can do, from four callers."""
    return dict.fromkeys(EQUAL, times * FULL_PER_S / 4)


async def test_three_times_too_much_costs_no_goodput() -> None:
    sim = Simulated()
    sim.run(at(0.5), 20.0)
    healthy = Simulated().run(at(0.9), SECONDS)
    assert sum(sim.late.values()) == 0
    goodput = sim.run(at(3.0), SECONDS)
    assert goodput >= 0.9 * healthy
    assert goodput >= 0.93 * FULL_PER_S
    assert sim.worst_overrun <= 0.05
    admitted = sum(sim.good.values()) + sum(sim.late.values())
    assert sum(sim.late.values()) <= 0.1 * admitted
    assert sim.stats.queued_rows * ROW_S <= DEADLINE_S, "no more than can be in time"


async def test_normal_service_is_back_when_the_load_is_gone() -> None:
    sim = Simulated()
    sim.run(at(3.0), 20.0)
    sim.run(at(0.5), 1.0)
    refused, late = sum(sim.refused.values()), sum(sim.late.values())
    sim.run(at(0.5), 20.0)
    assert (sum(sim.refused.values()), sum(sim.late.values())) == (refused, late)


@pytest.mark.parametrize("speed", [0.3, 3.0])
async def test_a_device_that_becomes_another_under_load_is_soon_known(speed: float) -> None:
    sim = Simulated()
    sim.run(at(3.0), 10.0)
    sim.speed = speed
    sim.run(at(3.0 * speed), 10.0)
    goodput = sim.run(at(3.0 * speed), 20.0)
    assert goodput >= 0.8 * speed * FULL_PER_S


async def test_the_greedy_get_what_the_modest_leave() -> None:
    sim, seconds = Simulated(), 20.0
    modest, greedy = Origin("modest"), Origin("greedy")
    load = {modest: 0.2 * FULL_PER_S, greedy: 3.0 * FULL_PER_S}
    goodput = sim.run(load, seconds)
    offered = 0.2 * FULL_PER_S * seconds
    assert sim.good["modest"] >= 0.85 * offered
    assert goodput >= 0.8 * FULL_PER_S


async def test_batch_calls_take_what_interactive_ones_leave_and_a_little_more() -> None:
    sim, seconds = Simulated(), 20.0
    interactive, batch = Origin("i"), Origin("b", Priority.BATCH)
    sim.run({interactive: 0.5 * FULL_PER_S, batch: 3.0 * FULL_PER_S}, seconds)
    assert sim.good["i"] >= 0.85 * 0.5 * FULL_PER_S * seconds
    assert sim.good["b"] > 0
    assert sim.refused["i"] + sim.late["i"] <= 0.05 * sim.good["i"]
