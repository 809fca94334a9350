"""Every metric expertmesh has, in one place, and the counters behind them for anyone to read.

Counters and histograms are plain numbers in dictionaries, updated the same way whether or not
anything is exported: an exporter reads them when it collects, and a call pays nothing for it.

What is counted several times a call is counted in a share of its own (`Counter.share`,
`Histogram.share`): one thread alone changes it, so it needs neither lock nor look-up (0.03 us in
place of 0.35 us; a layer call over four groups has about twenty of them).
"""

import threading
from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

Labels = tuple[str, ...]


@dataclass(frozen=True)
class MetricSpec:
    """What a metric is called, counts and is split by."""

    name: str
    unit: str
    """UCUM, annotations in braces."""
    description: str
    labels: Labels


class Distribution(NamedTuple):
    """What is kept of the values of a histogram."""

    num: int
    sum: float
    max: float

    @property
    def mean(self) -> float:
        """Arithmetic mean of the values."""
        return self.sum / self.num


class Share:
    """A part of a total, for one thread to change."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0


class Counter:
    """A total per combination of labels."""

    def __init__(self, spec: MetricSpec) -> None:
        self.spec = spec
        self._values: dict[Labels, float] = {}
        self._shares: list[tuple[Labels, Share]] = []
        self._lock = threading.Lock()  # counted on the event loop and on compute threads

    def add(self, amount: float, *labels: str) -> None:
        """Add `amount` under these label values, in the order of `spec.labels`."""
        assert len(labels) == len(self.spec.labels), f"{self.spec.name} wants {self.spec.labels}"
        with self._lock:
            self._values[labels] = self._values.get(labels, 0) + amount

    def share(self, *labels: str) -> Share:
        """A part of the total under these label values that only the calling thread changes, kept
        for good: to be made once, not per call."""
        assert len(labels) == len(self.spec.labels), f"{self.spec.name} wants {self.spec.labels}"
        share = Share()
        with self._lock:
            self._shares.append((labels, share))
        return share

    def read(self) -> dict[Labels, float]:
        """The values now, by label values."""
        with self._lock:
            values = dict(self._values)
            for labels, share in self._shares:
                values[labels] = values.get(labels, 0) + share.value
        return values

    def get(self, *labels: str) -> float:
        """The value under these label values; 0 before the first `add`."""
        return self.read().get(labels, 0)


class Level(Counter):
    """A number per combination of labels that goes up and, with negative amounts, down."""


class Buckets:
    """The values of one combination of labels, as OpenTelemetry counts them. One thread at a time
    adds to them."""

    __slots__ = ("bounds", "counts", "max", "min", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Values up to each bound and above the one before it; the last, above all bounds."""
        self.sum = 0.0
        self.min = float("inf")
        self.max = float("-inf")

    @property
    def num(self) -> int:
        """Of all values."""
        return sum(self.counts)

    def add(self, value: float) -> None:
        """One more value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
        if value < self.min:
            self.min = value
        if value > self.max:
            self.max = value

    def plus(self, other: "Buckets") -> "Buckets":
        """The values of both; both stay as they are."""
        both = Buckets(self.bounds)
        both.counts = [sum(pair) for pair in zip(self.counts.copy(), other.counts, strict=True)]
        both.sum = self.sum + other.sum
        both.min, both.max = min(self.min, other.min), max(self.max, other.max)
        return both


class Histogram:
    """A distribution per combination of labels."""

    def __init__(self, spec: MetricSpec, bounds: tuple[float, ...]) -> None:
        self.spec = spec
        self.bounds = bounds
        """Upper bucket bounds, ascending, in the metric's unit."""
        self._values: dict[Labels, Buckets] = {}
        self._shares: list[tuple[Labels, Buckets]] = []
        self._lock = threading.Lock()

    def record(self, value: float, *labels: str) -> None:
        """Note one value under these label values, in the order of `spec.labels`."""
        assert len(labels) == len(self.spec.labels), f"{self.spec.name} wants {self.spec.labels}"
        with self._lock:
            own = self._values.get(labels)
            if own is None:
                own = self._values[labels] = Buckets(self.bounds)
            own.add(value)

    def share(self, *labels: str) -> Buckets:
        """Some of the values under these label values, which only the calling thread adds to; see
        `Counter.share`. Who reads meanwhile may see a value in the counts and not yet in the sum.
        """
        assert len(labels) == len(self.spec.labels), f"{self.spec.name} wants {self.spec.labels}"
        share = Buckets(self.bounds)
        with self._lock:
            self._shares.append((labels, share))
        return share

    def buckets(self) -> dict[Labels, Buckets]:
        """A copy of everything now, by label values."""
        none = Buckets(self.bounds)
        with self._lock:
            found = {labels: own.plus(none) for labels, own in self._values.items()}
            for labels, share in self._shares:
                own = share.plus(found.get(labels, none))
                if own.num:
                    found[labels] = own
        return found

    def read(self) -> dict[Labels, Distribution]:
        """The distributions now, by label values."""
        return {
            labels: Distribution(own.num, own.sum, own.max)
            for labels, own in self.buckets().items()
        }

    def get(self, *labels: str) -> Distribution | None:
        """The distribution under these label values; None before the first `record`."""
        return self.read().get(labels)


_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_FRACS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_ROWS = tuple(float(2**power) for power in range(15))

_STAGE = ("stage",)
_GROUP = ("group",)
_MODEL = ("model",)


def _counter(name: str, unit: str, description: str, labels: Labels) -> Counter:
    return Counter(MetricSpec(f"expertmesh.{name}", unit, description, labels))


def _level(name: str, unit: str, description: str, labels: Labels) -> Level:
    return Level(MetricSpec(f"expertmesh.{name}", unit, description, labels))


def _histogram(
    name: str, unit: str, description: str, labels: Labels, bounds: tuple[float, ...] = _SECONDS
) -> Histogram:
    return Histogram(MetricSpec(f"expertmesh.{name}", unit, description, labels), bounds)


class Metrics:
    """One process's metrics. `stage` is "gateway", "router" or "expert"."""

    def __init__(self) -> None:
        self.calls = _counter("calls", "{call}", "Calls answered or failed", ("stage", "method"))
        self.errors = _counter(
            "errors", "{error}", "Failed calls by gRPC status code", ("stage", "code")
        )
        self.tokens = _counter("tokens", "{token}", "Tokens that entered a stage", _STAGE)
        self.rows = _counter(
            "rows", "{row}", "Rows (a token at one expert) sent to or computed by a group",
            ("stage", "group"),
        )  # fmt: skip
        self.in_flight_rows = _level(
            "in_flight_rows", "{row}", "Rows taken and not yet answered", ("stage", "group")
        )
        self.queue_wait = _histogram(
            "queue_wait", "s", "From admission to the start of compute", ("stage", "group")
        )
        self.batch_rows = _histogram("batch_rows", "{row}", "Rows computed together", _GROUP, _ROWS)
        self.compute_time = _histogram("compute_time", "s", "Of one batch on the device", _GROUP)
        self.residency_hits = _counter(
            "residency_hits", "{use}", "Expert uses that found the weights on the device", _GROUP
        )
        self.residency_misses = _counter(
            "residency_misses", "{use}", "Expert uses that waited for the weights", _GROUP
        )
        self.residency_loads = _counter(
            "residency_loads", "{load}", "Experts brought to the device", _GROUP
        )
        self.residency_prefetches = _counter(
            "residency_prefetches", "{load}", "Loads begun before anybody asked", _GROUP
        )
        self.residency_evictions = _counter(
            "residency_evictions", "{expert}", "Experts that left the device for others", _GROUP
        )
        self.resident_bytes = _level(
            "resident_bytes", "By", "Of device memory that experts' weights take", _GROUP
        )
        self.transport_time = _histogram(
            "transport_time", "s", "Round trip to a replica less its own time", _GROUP
        )
        self.retries = _counter(
            "retries", "{message}", "Messages of a group sent again to other replicas", _GROUP
        )
        self.hedges = _counter(
            "hedges", "{message}", "Messages sent to a second copy as the first was late", _GROUP
        )
        self.hedges_won = _counter(
            "hedges_won", "{message}", "Of these, those answered first", _GROUP
        )
        self.set_asides = _counter(
            "set_asides", "{event}", "Times a replica was found unfit for work", _GROUP
        )
        self.given_up_mass = _histogram(
            "given_up_mass",
            "{ratio}",
            "Share of a token's gate mass lost by selection",
            _MODEL,
            _FRACS,
        )
        self.degraded_mass = _histogram(
            "degraded_mass", "{ratio}",
            "Share of a token's weights in a layer that was for missing experts, where some were",
            _MODEL, _FRACS,
        )  # fmt: skip
        self.selection_error = _histogram(
            "selection_error", "{ratio}", "Relative error of sampled layer calls", _MODEL,
            _FRACS,
        )  # fmt: skip
        self.wanted_replicas = _level(
            "wanted_replicas", "{replica}", "Replicas that the rule of scaling wants", _GROUP
        )
        self.ready_replicas = _level(
            "ready_replicas", "{replica}", "Replicas that it counts on", _GROUP
        )
        self.scaling_changes = _counter(
            "scaling_changes", "{change}", "Changes of the number wanted", ("group", "reason")
        )
        self.generated_tokens = _counter(
            "generated_tokens", "{token}", "Tokens generated for callers", _MODEL
        )
        self.time_to_first_token = _histogram(
            "time_to_first_token", "s", "From a prompt's arrival to its first token", _MODEL
        )

    def counters(self) -> list[Counter]:
        """Every counter and level."""
        return [metric for metric in vars(self).values() if isinstance(metric, Counter)]

    def histograms(self) -> list[Histogram]:
        """Every histogram."""
        return [metric for metric in vars(self).values() if isinstance(metric, Histogram)]
