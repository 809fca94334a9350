"""What is known of an expert group's load: samples, and means over spans of them. Pure."""

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, takewhile
from statistics import median

from expertmesh.experts.scaling_options import ScalingOptions

_POINTS = 12
"""Points that a trend is looked for in."""
_LEAST_POINTS = 6
_SIGNIFICANT = 2.5
"""Standard deviations that the number of rises must be above that of falls."""


@dataclass(frozen=True, slots=True)
class GroupSample:
    """One expert group's load in the interval that ends at `at_s`.

    Any clock will do, as long as it is the same for all samples of a group.
    """

    at_s: float
    ready: int
    """Replicas that take work and are in these numbers."""
    busy: float
    """How many of them were computing, in the mean over the interval: 0 to `ready`."""
    arrival_rows_per_s: float
    """Rows that came, computed or not."""
    done_rows_per_s: float
    """Rows that were answered."""
    queued_rows: float = 0.0
    """Rows admitted and not yet answered, at the end."""
    queue_delay_s: float = 0.0
    """Mean time from arrival to the start of compute, of rows started in the interval."""
    row_s: float = 0.0
    """Compute time of a row, batched as lately; 0 if unknown."""
    starting: int = 0
    """Replicas that are to come and do not take work yet."""
    busiest: float | None = None
    """Share of the interval in which the busiest replica was computing; None if all are alike."""

    @property
    def present(self) -> int:
        """Replicas there are or will be."""
        return self.ready + self.starting

    @property
    def demand(self) -> float:
        """Replicas' worth of work that came: what was computed, and what was left to later."""
        return self.busy + (self.arrival_rows_per_s - self.done_rows_per_s) * self.row_s

    @property
    def backlog_s(self) -> float:
        """Time one replica needs for what is admitted."""
        return self.queued_rows * self.row_s


def _busiest(sample: GroupSample) -> float:
    return sample.busy / max(1, sample.ready) if sample.busiest is None else sample.busiest


@dataclass(frozen=True, slots=True)
class Span:
    """Means over consecutive samples."""

    begin_s: float
    """Of its first sample."""
    end_s: float
    """Of its last sample."""
    demand: float
    """Replicas' worth of work, not below 0."""
    busiest: float
    """Mean share of time of the busiest replica."""
    delay_s: float
    arrival_rows_per_s: float
    most_ready: int
    """Greatest number of ready replicas."""
    least_present: int
    """Least number of replicas there were or were to be."""

    @classmethod
    def of(cls, samples: Collection[GroupSample]) -> "Span":
        """Of at least one sample, in any order."""
        num = len(samples)
        times_s = [sample.at_s for sample in samples]
        return cls(
            min(times_s),
            max(times_s),
            max(0.0, sum(sample.demand for sample in samples) / num),
            sum(map(_busiest, samples)) / num,
            sum(sample.queue_delay_s for sample in samples) / num,
            sum(sample.arrival_rows_per_s for sample in samples) / num,
            max(sample.ready for sample in samples),
            min(sample.present for sample in samples),
        )


class LoadHistory:
    """The recent load of one group: its last samples one by one, older ones as means over spans.

    Args:
        span_s: length of a span.
        keep_s: how far back spans are kept.
    """

    def __init__(self, span_s: float, keep_s: float, samples: Iterable[GroupSample] = ()) -> None:
        self._span_s = span_s
        self._keep_s = keep_s
        self._recent: deque[GroupSample] = deque()
        """Those of the last `span_s`."""
        self._open: list[GroupSample] = []
        """Those of the span that is not over yet."""
        self._spans: deque[Span] = deque()
        for sample in samples:
            self.add(sample)

    @classmethod
    def of(cls, options: ScalingOptions, samples: Iterable[GroupSample] = ()) -> "LoadHistory":
        """As long as the rule looks back."""
        return cls(options.up_window_s, options.history_s, samples)

    def add(self, sample: GroupSample) -> None:
        """Append a sample.

        Raises:
            ValueError: it is not newer than the last.
        """
        if self._recent and sample.at_s <= self.newest.at_s:
            raise ValueError(f"at_s: {sample.at_s} is not after {self.newest.at_s}")
        if self._open and sample.at_s >= self._open[0].at_s + self._span_s:
            self._spans.appendleft(Span.of(self._open))
            self._open = []
        self._open.append(sample)
        self._recent.append(sample)
        while self._recent[0].at_s <= sample.at_s - self._span_s:
            self._recent.popleft()
        # the oldest span reaches beyond `keep_s`: all of it is known
        while len(self._spans) > 1 and self._spans[-2].begin_s <= sample.at_s - self._keep_s:
            self._spans.pop()

    @property
    def newest(self) -> GroupSample:
        """The last sample; there must be one."""
        return self._recent[-1]

    @property
    def recent(self) -> Sequence[GroupSample]:
        """Samples of the last `span_s`, oldest first."""
        return self._recent

    @property
    def age_s(self) -> float:
        """Time from the first sample kept to the last."""
        first_s = self._spans[-1].begin_s if self._spans else self._open[0].at_s
        return self.newest.at_s - first_s

    def spans(self) -> list[Span]:
        """Newest first: the last `span_s`, then what was before. The first may overlap the next."""
        return [Span.of(self._recent), *self._spans]


def growth(spans: Sequence[Span], window_s: float, lead_s: float) -> float:
    """Arrivals after `lead_s` relative to those of now, at least 1, if they rise beyond doubt.

    The slope is the median of those between any two points of the window (Theil-Sen), because a
    step is not a slope: a least-squares line rises on for as long as the step is in the window. It
    counts if so many later points above earlier ones are no accident (Mann-Kendall). And it is not
    followed further than arrivals have really risen in the last `lead_s`.

    Args:
        spans: newest first.
    """
    newest = spans[0]
    earlier = next((s for s in spans if newest.end_s - s.end_s >= lead_s), newest)
    risen = newest.arrival_rows_per_s - earlier.arrival_rows_per_s
    if not lead_s or risen <= 0:
        return 1.0
    more = min(_sure_slope(_points(spans, window_s)) * lead_s, risen)
    return 1.0 + max(0.0, more) / newest.arrival_rows_per_s


def _points(spans: Sequence[Span], window_s: float) -> list[tuple[float, float]]:
    """(time, arrivals) in the means of equal parts of the window, newest first."""
    now_s, part_s = spans[0].end_s, window_s / _POINTS
    ages = ((now_s - span.end_s, span) for span in spans)
    inside = takewhile(lambda aged: aged[0] < window_s, ages)
    points = []
    for _, group in groupby(inside, lambda aged: int(aged[0] / part_s)):
        own = [span for _, span in group]
        arrivals = sum(span.arrival_rows_per_s for span in own) / len(own)
        points.append((own[0].end_s, arrivals))
    return points


def _sure_slope(points: Sequence[tuple[float, float]]) -> float:
    """Slope of (time, value) points, newest first; 0 if they are few or it may be noise."""
    slopes = [
        (later - earlier) / (later_s - earlier_s)
        for (later_s, later), (earlier_s, earlier) in combinations(points, 2)
        if later_s > earlier_s
    ]
    num = len(points)
    if num < _LEAST_POINTS:
        return 0.0
    rises = sum(slope > 0 for slope in slopes) - sum(slope < 0 for slope in slopes)
    spread = math.sqrt(num * (num - 1) * (2 * num + 5) / 18)
    return median(slopes) if rises > _SIGNIFICANT * spread else 0.0
