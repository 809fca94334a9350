"""How many replicas an expert group should have, and why. Pure: no clock, no Ray, no I/O.

The load of a group is measured in replicas: how many of them it keeps busy, plus the work that came
and was left to later. From that follow two numbers with a gap between them:

    more replicas   if the load of the last seconds, or the load to come if arrivals go on rising,
                    is above `target_busy_frac` of them; if waiting rows could not be worked off in
                    `catch_up_s`; or if rows wait too long although nobody is overloaded (bursts)
    fewer replicas  if the greatest load of the whole `down_window_s` would leave them below the
                    target by `hysteresis_frac`, no row waited too long in it, no replica came in
                    it, and so few replicas are not known to have let rows wait at such a load

Replicas that are starting count as coming, not as capacity: nothing more is started for what they
will do, nothing is expected of them before they are ready. The dead band is that of Kubernetes'
HorizontalPodAutoscaler with its stabilization window, made relative to the target.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from expertmesh.experts.load_history import GroupSample, LoadHistory, Span, growth
from expertmesh.experts.scaling_options import ScalingOptions

Reason = Literal[
    "override", "stale", "starting", "load", "trend", "backlog", "delay", "calm", "steady", "idle",
    "woken", "bounds",
]  # fmt: skip
"""What decided, in one word; `Decision.text` has the numbers."""

STALE_S = 10.0
"""A newest sample older than this says nothing about now."""
_MAX_GROWTH = 4.0
"""Times the ready replicas that one look at them may ask for: rates of a moment can be absurd."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Override:
    """A number of replicas set by hand."""

    replicas: int
    until_s: float
    """By the clock that `decide` is told."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there should be."""

    wanted: int
    present: int
    """Ready ones and starting ones."""
    ready: int
    reason: Reason
    text: str
    """Why, in words and numbers."""
    demand: float = 0.0
    """Load of the last seconds, in replicas."""
    expected: float = 0.0
    """Load after `lead_s` if arrivals go on as they did, in replicas."""
    delay_s: float = 0.0
    """Mean time rows of the last seconds waited."""


class _Want(NamedTuple):
    replicas: int
    reason: Reason
    text: str


def decide(
    history: LoadHistory,
    options: ScalingOptions,
    *,
    now_s: float,
    room: int | None = None,
    has_fallback: bool = False,
    override: Override | None = None,
) -> Decision:
    """How many replicas the group should have.

    Args:
        history: at least one sample.
        now_s: by the clock of the samples and of `override`.
        room: replicas that memory and devices can hold, those present included; none is any number.
        has_fallback: whether others serve the group's experts when it has no replica.

    Returns:
        `wanted` is within `min_replicas` and `max_replicas` always, and not above `room` as long as
        that leaves `min_replicas`.
    """
    newest = history.newest
    look = _Look(history, options)
    if override and now_s < override.until_s:
        left_s = override.until_s - now_s
        want = _Want(override.replicas, "override", f"set by hand, for {left_s:.0f} s more")
    elif now_s - newest.at_s > STALE_S:
        text = f"no news for {now_s - newest.at_s:.0f} s; what there is stays"
        want = _Want(newest.present, "stale", text)
    elif newest.ready == 0:
        want = _without_replicas(look)
    else:
        want = _by_load(look, has_fallback)
    want = _bounded(want, newest.present, options, room, has_fallback)
    return Decision(
        want.replicas,
        newest.present,
        newest.ready,
        want.reason,
        want.text,
        demand=look.demand,
        expected=look.expected,
        delay_s=look.now.delay_s,
    )


class _Look:
    """What the rule sees in a history."""

    def __init__(self, history: LoadHistory, options: ScalingOptions) -> None:
        self.history = history
        self.options = options
        self.newest: GroupSample = history.newest
        self.spans = history.spans()
        self.now = self.spans[0]
        self.demand = self.load_of(self.now)
        self.expected = self.demand * growth(self.spans, options.trend_window_s, options.lead_s)

    def load_of(self, span: Span) -> float:
        """Load of a span in replicas, kept sane."""
        return min(span.demand, _MAX_GROWTH * max(1, span.most_ready))

    def waits_idly(self, number: int) -> bool:
        """Whether rows of a span waited too long although no replica was busier than it should be.

        Of an overload rows are left that wait for one replica while new ones idle, and so of the
        span after it; that tells nothing."""
        late_s, target = self.options.max_queue_delay_s, self.options.target_busy_frac
        own_and_before = self.spans[number : number + 2]
        is_idle = all(span.busiest <= target for span in own_and_before)
        return is_idle and self.spans[number].delay_s > late_s

    def within(self, back_s: float) -> list[Span]:
        """Spans that began in the last `back_s`, newest first."""
        begin_s = self.newest.at_s - back_s
        return [span for span in self.spans if span.begin_s >= begin_s]


def _without_replicas(look: _Look) -> _Want:
    present = look.newest.present
    if present:
        return _Want(present, "starting", f"none of {present} replicas is ready yet")
    if look.now.arrival_rows_per_s > 0:
        needed = _ceil(look.demand / look.options.target_busy_frac)
        text = f"{look.now.arrival_rows_per_s:.3g} rows/s come for experts without a replica"
        return _Want(max(1, needed), "woken", text)
    return _Want(0, "idle", "no replica, and no row that would need one")


def _by_load(look: _Look, has_fallback: bool) -> _Want:
    present = look.newest.present
    most = max((_for_load(look), _for_backlog(look), _for_delay(look)), key=lambda w: w.replicas)
    if most.replicas > present:
        return most
    if has_fallback and not look.options.min_replicas and (idle := _idle(look)):
        return idle
    return _fewer(look, most.replicas) or _steady(look)


def _for_load(look: _Look) -> _Want:
    """Enough for the load of the last seconds, or the one to come if that is more."""
    target = look.options.target_busy_frac
    needed, expected = _ceil(look.demand / target), _ceil(look.expected / target)
    text = f"load of {look.demand:.2f} replicas, each to be {target:.0%} busy"
    if expected <= needed:
        return _Want(needed, "load", text)
    text += f", rising to {look.expected:.2f} in {look.options.lead_s:g} s"
    return _Want(expected, "trend", text)


def _for_backlog(look: _Look) -> _Want:
    """Enough, if always busy, to work off in time what waits too long."""
    options, newest = look.options, look.newest
    late_s = newest.backlog_s - options.max_queue_delay_s * newest.ready
    if late_s <= 0:
        return _Want(0, "backlog", "")
    extra = min(late_s / options.catch_up_s, _MAX_GROWTH * newest.ready)
    text = (
        f"{newest.queued_rows:.0f} rows wait, {newest.backlog_s:.2g} s of work beside a load of "
        f"{look.demand:.2f} replicas, to be done in {options.catch_up_s:g} s"
    )
    return _Want(_ceil(look.demand + extra), "backlog", text)


def _for_delay(look: _Look) -> _Want:
    """One more if rows wait too long although replicas are less busy than they should be.

    While the queue of an overload is worked off all are busy; then `_for_backlog` decides. What
    was before the newest replica got ready says nothing about it.
    """
    options, ready, now = look.options, look.newest.ready, look.now
    samples = look.history.recent
    same = len(samples) > 1 and all(sample.ready == ready for sample in samples)
    if not same or not look.waits_idly(0):
        return _Want(0, "delay", "")
    text = (
        f"rows wait {now.delay_s:.3g} s, more than {options.max_queue_delay_s:g} s, with "
        f"none of {ready} replicas more than {now.busiest:.0%} busy"
    )
    return _Want(ready + 1, "delay", text)


def _idle(look: _Look) -> _Want | None:
    quiet_s = look.options.zero_after_s
    if look.history.age_s < quiet_s or any(s.arrival_rows_per_s for s in look.within(quiet_s)):
        return None
    return _Want(0, "idle", f"no row for {quiet_s:g} s; others hold these experts")


def _fewer(look: _Look, needed: int) -> _Want | None:
    """As few as the whole calm window allows; none if it was not calm or allows no fewer."""
    options, window_s = look.options, look.options.down_window_s
    calm = look.within(window_s)
    if look.history.age_s < window_s:
        return None
    if max(span.delay_s for span in calm) > options.max_queue_delay_s:
        return None
    if min(span.least_present for span in calm) < look.newest.present:
        return None  # whatever asked for more than that may be back in a moment
    greatest = max(look.expected, *(look.load_of(span) for span in calm))
    enough = _ceil(greatest / (options.target_busy_frac * (1 - options.hysteresis_frac)))
    enough = max(enough, needed, 1)
    enough = next((n for n in range(enough, look.newest.present) if not _too_few(look, n)), 0)
    if not enough:
        return None
    text = f"for {window_s:g} s a load of at most {greatest:.2f} replicas, and no row waited long"
    return _Want(enough, "calm", text)


def _too_few(look: _Look, replicas: int) -> bool:
    """Whether so many, or more, let rows wait too long before, at a load that was not much higher
    and did not keep them busy."""
    similar = look.demand * (1 + look.options.hysteresis_frac)
    return any(
        span.most_ready >= replicas and span.demand <= similar and look.waits_idly(number)
        for number, span in enumerate(look.within(look.options.memory_s))
        if span.delay_s  # few have one
    )


def _steady(look: _Look) -> _Want:
    newest, now = look.newest, look.now
    text = (
        f"load of {look.demand:.2f} replicas of {newest.ready}, rows wait {now.delay_s:.3g} s: "
        "no need for more, none to go yet"
    )
    return _Want(newest.present, "steady", text)


def _bounded(
    want: _Want, present: int, options: ScalingOptions, room: int | None, has_fallback: bool
) -> _Want:
    most, bound = options.max_replicas, f"max_replicas {options.max_replicas}"
    if room is not None and room < most:
        most, bound = room, f"memory and devices have room for {room}"
    # without a fallback the last replica stays, whatever min_replicas says
    least = options.min_replicas or (0 if has_fallback else 1)
    if want.replicas > most:
        want = want._replace(replicas=most, text=f"{want.text}; {bound}")
    if want.replicas < least:
        least_text = f"{want.text}; at least {least}"
        want = want._replace(replicas=least, text=least_text)
    if want.replicas != present and want.reason in ("steady", "stale", "starting"):
        want = want._replace(reason="bounds")
    return want


def _ceil(replicas: float) -> int:
    """Rounded up, with no mind to the last bits."""
    return math.ceil(replicas - _ROUNDING)
