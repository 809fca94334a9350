"""Export over OTLP gRPC: the only module that imports the OpenTelemetry SDK, and only if used."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import DEFAULT_ON
from opentelemetry.trace import Tracer

from expertmesh.runtime.metrics import Counter, Level, Metrics
from expertmesh.runtime.metrics import Histogram as MetricHistogram

_SCOPE = "expertmesh"
_EXPORT_TIMEOUT_S = 5.0
_MOST_PENDING = 100_000
Record = Callable[[float, dict[str, str]], None]


@dataclass(frozen=True)
class ExportSettings:
    """Where telemetry goes and how it is labelled; see `telemetry.configure`."""

    service_name: str
    instance: str
    endpoint: str
    interval_s: float


def start_export(
    settings: ExportSettings, metrics: Metrics
) -> tuple[Tracer, Callable[[float], None]]:
    """Export `metrics` and the returned tracer's spans until the returned function is called."""
    resource = Resource.create(
        {
            "service.name": settings.service_name,
            "service.instance.id": settings.instance,
            "service.version": version("expertmesh"),
        }
    )
    tracers = _tracer_provider(settings, resource)
    meters = _meter_provider(settings, resource)
    _export_metrics(metrics, meters.get_meter(_SCOPE))

    def shut_down(timeout_s: float) -> None:
        # An exporter that cannot reach its collector waits between its tries, longer than we do.
        worker = threading.Thread(target=_flush, args=(tracers, meters, timeout_s), daemon=True)
        worker.start()
        worker.join(timeout_s)

    return tracers.get_tracer(_SCOPE), shut_down


def _flush(tracers: TracerProvider, meters: MeterProvider, timeout_s: float) -> None:
    tracers.shutdown()
    meters.shutdown(timeout_millis=timeout_s * 1000)


def _tracer_provider(settings: ExportSettings, resource: Resource) -> TracerProvider:
    provider = TracerProvider(
        resource=resource,
        sampler=DEFAULT_ON,  # what is not sampled never comes here
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=settings.endpoint, timeout=_EXPORT_TIMEOUT_S)
    interval_ms = settings.interval_s * 1000
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=interval_ms))
    return provider


def _meter_provider(settings: ExportSettings, resource: Resource) -> MeterProvider:
    exporter = OTLPMetricExporter(endpoint=settings.endpoint, timeout=_EXPORT_TIMEOUT_S)
    reader = PeriodicExportingMetricReader(
        exporter, export_interval_millis=settings.interval_s * 1000
    )
    return MeterProvider([reader], resource=resource, shutdown_on_exit=False)


class _Pending:
    """Values of histograms on their way to the SDK, which takes several microseconds for each: on
    the hot path they are only noted, and handed over when the SDK collects.

    It calls the callbacks of observable instruments first, and one of them is `drain`.
    """

    def __init__(self) -> None:
        self._values: deque[tuple[MetricHistogram, float, tuple[str, ...]]] = deque()
        self._instruments: dict[MetricHistogram, Record] = {}

    def add(self, histogram: MetricHistogram, record: Record) -> None:
        """Have the histogram's values noted here for `record`."""
        self._instruments[histogram] = record
        histogram.export = lambda value, labels: self._note(histogram, value, labels)

    def _note(self, histogram: MetricHistogram, value: float, labels: tuple[str, ...]) -> None:
        self._values.append((histogram, value, labels))
        if len(self._values) > _MOST_PENDING:
            self.drain()

    def drain(self) -> None:
        """Hand over everything noted so far."""
        while self._values:
            try:
                histogram, value, labels = self._values.popleft()
            except IndexError:  # another thread was faster
                return
            named = dict(zip(histogram.spec.labels, labels, strict=True))
            self._instruments[histogram](value, named)


def _export_metrics(metrics: Metrics, meter: Meter) -> None:
    pending = _Pending()
    for counter in metrics.counters():
        spec = counter.spec
        create = (
            meter.create_observable_up_down_counter
            if isinstance(counter, Level)
            else meter.create_observable_counter
        )
        create(spec.name, [_observe(counter, pending)], spec.unit, spec.description)
    for histogram in metrics.histograms():
        spec = histogram.spec
        instrument = meter.create_histogram(
            spec.name,
            spec.unit,
            spec.description,
            explicit_bucket_boundaries_advisory=list(histogram.bounds),
        )
        pending.add(histogram, instrument.record)


def _observe(
    counter: Counter, pending: _Pending
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(_: CallbackOptions) -> Iterator[Observation]:
        pending.drain()
        for labels, value in counter.read().items():
            yield Observation(value, dict(zip(counter.spec.labels, labels, strict=True)))

    return observe
