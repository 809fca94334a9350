"""An OpenTelemetry collector in this process: keeps what arrives over OTLP."""

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_rpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_rpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """What has arrived so far."""

    def __init__(self) -> None:
        self.all_spans: list[Span] = []
        self.service_of: dict[str, str] = {}
        """Name of a span -> `service.name` of its process."""
        self.metrics: dict[str, Any] = {}

    @property
    def spans(self) -> dict[str, Span]:
        """The last span of each name."""
        return {span.name: span for span in self.all_spans}

    def named(self, name: str) -> list[Span]:
        """Every span of this name, by start."""
        found = [span for span in self.all_spans if span.name == name]
        return sorted(found, key=lambda span: span.start_time_unix_nano)


class _TraceService(trace_rpc.TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self._collector.all_spans.append(span)
                    self._collector.service_of[span.name] = attributes["service.name"]
        return trace_pb.ExportTraceServiceResponse()


class _MetricsService(metrics_rpc.MetricsServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                self._collector.metrics |= {metric.name: metric for metric in scope.metrics}
        return metrics_pb.ExportMetricsServiceResponse()


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """A running collector and its endpoint, "http://host:port"."""
    received = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    add_trace: Any = trace_rpc.add_TraceServiceServicer_to_server
    add_trace(_TraceService(received), server)
    add_metrics: Any = metrics_rpc.add_MetricsServiceServicer_to_server
    add_metrics(_MetricsService(received), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield received, f"http://127.0.0.1:{port}"
    server.stop(None)
