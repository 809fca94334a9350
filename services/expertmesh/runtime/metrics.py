"""Every metric expertmesh has, in one place, and the counters behind them for anyone to read.

The counters are plain dictionaries, updated the same way whether or not anything is exported: an
exporter reads them when it collects. Only distributions are also handed to it value by value,
because OpenTelemetry has no way to read those later.
"""

import threading
from collections.abc import Callable
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


class Counter:
    """A total per combination of labels."""

    def __init__(self, spec: MetricSpec) -> None:
        self.spec = spec
        self._values: dict[Labels, float] = {}
        self._lock = threading.Lock()  # counted on the event loop and on compute threads

    def add(self, amount: float, *labels: str) -> None:
        """Add `amount` under these label values, in the order of `spec.labels`."""
        assert len(labels) == len(self.spec.labels), f"{self.spec.name} wants {self.spec.labels}"
        with self._lock:
            self._values[labels] = self._values.get(labels, 0) + amount

    def read(self) -> dict[Labels, float]:
        """The values now, by label values."""
        with self._lock:
            return dict(self._values)

    def get(self, *labels: str) -> float:
        """The value under these label values; 0 before the first `add`."""
        return self._values.get(labels, 0)


class Level(Counter):
    """A number per combination of labels that goes up and, with negative amounts, down."""


class Histogram:
    """A distribution per combination of labels."""

    def __init__(self, spec: MetricSpec, bounds: tuple[float, ...]) -> None:
        self.spec = spec
        self.bounds = bounds
        """Upper bucket bounds for the exporter, in the metric's unit."""
        self.export: Callable[[float, Labels], None] | None = None
        """Where each value also goes when an exporter is set up."""
        self._values: dict[Labels, Distribution] = {}
        self._lock = threading.Lock()

    def record(self, value: float, *labels: str) -> None:
        """Note one value under these label values, in the order of `spec.labels`."""
        assert len(labels) == len(self.spec.labels), f"{self.spec.name} wants {self.spec.labels}"
        with self._lock:
            old = self._values.get(labels, _NOTHING)
            self._values[labels] = Distribution(old.num + 1, old.sum + value, max(old.max, value))
        if self.export is not None:
            self.export(value, labels)

    def read(self) -> dict[Labels, Distribution]:
        """The distributions now, by label values."""
        with self._lock:
            return dict(self._values)

    def get(self, *labels: str) -> Distribution | None:
        """The distribution under these label values; None before the first `record`."""
        return self._values.get(labels)


_NOTHING = Distribution(0, 0.0, float("-inf"))
_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
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
        self.transport_time = _histogram(
            "transport_time", "s", "Round trip to a replica less its own time", _GROUP
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
