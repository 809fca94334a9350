"""What a replica tells Serve's autoscaling about its load, and what a group makes of it. Pure.

Serve carries numbers by name. Totals are told, not rates: whoever reads two reports knows what was
between them, however often they come. The rule of scaling rides along, a number per field.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from expertmesh.experts.live_config import GroupScaling
from expertmesh.experts.load_history import GroupSample
from expertmesh.runtime.config import validate

RULE = "scaling."
"""Before the names of the rule's fields."""
_MODES = ("advisory", "on")
SILENT_S = 3.0
"""A replica not heard from for so long is not counted on."""


class Point(Protocol):
    """A value at a time, as Serve keeps it."""

    @property
    def timestamp(self) -> float:
        """Seconds, by the replica's clock."""

    @property
    def value(self) -> float:
        """The number."""


Series = Mapping[str, Mapping[Any, Sequence[Point]]]
"""Points by name, then by replica, oldest first: Serve's `raw_metrics`."""


def rule_as_numbers(rule: GroupScaling) -> dict[str, float]:
    """The rule's fields by name; the mode by its place in the list of modes."""
    fields = rule.model_dump() | {"mode": _MODES.index(rule.mode)}
    return {f"{RULE}{name}": float(value) for name, value in fields.items()}


def rule_of(series: Series) -> GroupScaling | None:
    """The newest rule in the reports; None if there is none yet.

    Raises:
        ConfigError: reports of another version, with other fields.
    """
    newest: dict[str, tuple[float, float]] = {}
    for name, by_replica in series.items():
        if name.startswith(RULE):
            points = [points[-1] for points in by_replica.values() if points]
            if points:
                newest[name.removeprefix(RULE)] = max((p.timestamp, p.value) for p in points)
    if not newest:
        return None
    fields: dict[str, Any] = {name: value for name, (_, value) in newest.items()}
    return validate(GroupScaling, fields | {"mode": _MODES[int(fields.get("mode", 0))]})


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """A replica's load at one moment; totals since it started."""

    at_s: float
    arrived_rows: float = 0.0
    done_rows: float = 0.0
    busy_s: float = 0.0
    """Spent computing."""
    loop_s: float = 0.0
    """CPU time of its event loop, which reads and writes messages."""
    waited_row_s: float = 0.0
    """Waited by all rows together."""
    oldest_wait_s: float = 0.0
    queued_rows: float = 0.0
    row_time_us: float = 0.0
    free_bytes: float = 0.0
    """Memory that another replica could take; 0 if the replica cannot tell."""
    need_bytes: float = 0.0
    """Memory that another replica would take."""

    def numbers(self) -> dict[str, float]:
        """For `record_autoscaling_stats`."""
        return {name: float(getattr(self, name)) for name in REPORTED}


REPORTED = tuple(name for name in ReplicaReport.__dataclass_fields__ if name != "at_s")


def reports_of(series: Series) -> dict[Any, list[ReplicaReport]]:
    """All reports of each replica, oldest first."""
    found: dict[Any, dict[float, dict[str, float]]] = {}
    for name in REPORTED:
        for replica, points in series.get(name, {}).items():
            by_time = found.setdefault(replica, {})
            for point in points:
                by_time.setdefault(point.timestamp, {})[name] = point.value
    return {
        replica: [ReplicaReport(at_s, **values) for at_s, values in sorted(by_time.items())]
        for replica, by_time in found.items()
    }


@dataclass(frozen=True, slots=True)
class ReplicaRates:
    """A replica between two of its reports."""

    newest: ReplicaReport
    busy_frac: float
    arrival_rows_per_s: float
    done_rows_per_s: float
    delay_s: float

    @classmethod
    def between(cls, old: ReplicaReport, new: ReplicaReport) -> "ReplicaRates":
        """`new` is later. A replica is busy with computing or with messages, whichever is more."""
        passed_s = new.at_s - old.at_s
        busy_s = max(new.busy_s - old.busy_s, new.loop_s - old.loop_s, 0.0)
        done = max(0.0, new.done_rows - old.done_rows)
        waited_row_s = max(0.0, new.waited_row_s - old.waited_row_s)
        return cls(
            new,
            min(1.0, busy_s / passed_s),
            max(0.0, new.arrived_rows - old.arrived_rows) / passed_s,
            done / passed_s,
            waited_row_s / done if done else new.oldest_wait_s,
        )


class LoadCollector:
    """Makes a sample of the group from what its replicas report, each in its own rhythm.

    Args:
        every_s: time between samples.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._newest: dict[Any, ReplicaReport] = {}
        self._rates: dict[Any, ReplicaRates] = {}
        self._heard_s: dict[Any, float] = {}
        self._sampled_s = float("-inf")

    def take(self, series: Series, target: int, now_s: float) -> GroupSample | None:
        """A sample if it is time for one and somebody has news, else None.

        Args:
            series: of the replicas that run.
            target: replicas there are to be; those that do not report yet are starting.
        """
        if now_s < self._sampled_s + self._every_s or not self._update(series, now_s):
            return None
        self._sampled_s = now_s
        return _sample(list(self._rates.values()), target, now_s)

    @property
    def reports(self) -> list[ReplicaReport]:
        """The newest of each replica that is heard from."""
        return [rates.newest for rates in self._rates.values()]

    def _update(self, series: Series, now_s: float) -> bool:
        """Whether there was news. Clocks of replicas are compared with nobody's."""
        news = False
        reports = reports_of(series)
        for replica, own in reports.items():
            old, new = self._newest.get(replica, own[0]), own[-1]
            self._newest[replica] = new
            if new.at_s > old.at_s:
                self._rates[replica] = ReplicaRates.between(old, new)
                self._heard_s[replica] = now_s
                news = True
        for replica in list(self._rates):
            if replica not in reports or now_s - self._heard_s[replica] > SILENT_S:
                del self._rates[replica]
        self._newest = {replica: self._newest[replica] for replica in reports}
        return news


def _sample(rates: Sequence[ReplicaRates], target: int, now_s: float) -> GroupSample:
    weights = [own.done_rows_per_s + own.newest.queued_rows for own in rates]
    waited = sum(own.delay_s * weight for own, weight in zip(rates, weights, strict=True))
    times_us = [own.newest.row_time_us for own in rates if own.newest.row_time_us]
    return GroupSample(
        now_s,
        len(rates),
        sum(own.busy_frac for own in rates),
        sum(own.arrival_rows_per_s for own in rates),
        sum(own.done_rows_per_s for own in rates),
        queued_rows=sum(own.newest.queued_rows for own in rates),
        queue_delay_s=waited / sum(weights) if any(weights) else 0.0,
        row_s=sum(times_us) / len(times_us) / 1e6 if times_us else 0.0,
        starting=max(0, target - len(rates)),
        busiest=max((own.busy_frac for own in rates), default=0.0),
    )


def room(
    reports: Sequence[ReplicaReport], present: int, more_by_gpus: int | None = None
) -> int | None:
    """Replicas that there is room for, those present included; None if nobody can tell.

    Of memory, the most that is free at one of them: they may be on different machines. Those that
    are starting may have taken their part or not yet: they are counted as if not, and nobody who
    is present has to go for it.

    Args:
        reports: of the ready ones.
    """
    told = [report for report in reports if report.free_bytes and report.need_bytes]
    more = [] if more_by_gpus is None else [more_by_gpus]
    if told:
        more.append(max(int(report.free_bytes // report.need_bytes) for report in told))
    return max(present, len(reports) + min(more)) if more else None
