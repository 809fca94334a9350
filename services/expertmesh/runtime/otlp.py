"""Export over OTLP gRPC: the only module that imports the OpenTelemetry SDK, and only if used."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    HistogramDataPoint,
    Metric,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
    ScopeMetrics,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import DEFAULT_ON
from opentelemetry.trace import Tracer

from expertmesh.runtime.metrics import Counter, Histogram, Level, Metrics

_SCOPE = "expertmesh"
_EXPORT_TIMEOUT_S = 5.0


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
    meters = _meter_provider(settings, resource, metrics.histograms())
    _observe_counters(metrics, meters.get_meter(_SCOPE))

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


def _meter_provider(
    settings: ExportSettings, resource: Resource, histograms: Sequence[Histogram]
) -> MeterProvider:
    exporter = _WithHistograms(histograms, endpoint=settings.endpoint, timeout=_EXPORT_TIMEOUT_S)
    reader = PeriodicExportingMetricReader(
        exporter, export_interval_millis=settings.interval_s * 1000
    )
    return MeterProvider([reader], resource=resource, shutdown_on_exit=False)


class _WithHistograms(OTLPMetricExporter):
    """Adds our histograms, which are in buckets already, to what the SDK has collected.

    The SDK only takes histograms value by value, at several microseconds each on the hot path.
    """

    def __init__(self, histograms: Sequence[Histogram], **options: Any) -> None:
        super().__init__(**options)
        self._histograms = histograms
        self._since_ns = time.time_ns()

    def export(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any
    ) -> MetricExportResult:
        """See `MetricExporter.export`."""
        now_ns = time.time_ns()
        metrics = [_metric(own, self._since_ns, now_ns) for own in self._histograms]
        used = [metric for metric in metrics if metric.data.data_points]
        resources = [
            replace(of, scope_metrics=[_with(used, scope) for scope in of.scope_metrics])
            for of in metrics_data.resource_metrics
        ]
        return super().export(MetricsData(resources), timeout_millis, **kwargs)


def _with(metrics: Sequence[Metric], scope: ScopeMetrics) -> ScopeMetrics:
    return replace(scope, metrics=[*scope.metrics, *metrics])


def _metric(histogram: Histogram, since_ns: int, now_ns: int) -> Metric:
    spec = histogram.spec
    points = [
        HistogramDataPoint(
            attributes=dict(zip(spec.labels, labels, strict=True)),
            start_time_unix_nano=since_ns,
            time_unix_nano=now_ns,
            count=own.num,
            sum=own.sum,
            bucket_counts=own.counts,
            explicit_bounds=histogram.bounds,
            min=own.min,
            max=own.max,
        )
        for labels, own in histogram.buckets().items()
    ]
    data = HistogramData(points, AggregationTemporality.CUMULATIVE)
    return Metric(spec.name, spec.description, spec.unit, data)


def _observe_counters(metrics: Metrics, meter: Meter) -> None:
    for counter in metrics.counters():
        spec = counter.spec
        create = (
            meter.create_observable_up_down_counter
            if isinstance(counter, Level)
            else meter.create_observable_counter
        )
        create(spec.name, [_observe(counter)], spec.unit, spec.description)


def _observe(counter: Counter) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(_: CallbackOptions) -> Iterator[Observation]:
        for labels, value in counter.read().items():
            yield Observation(value, dict(zip(counter.spec.labels, labels, strict=True)))

    return observe
