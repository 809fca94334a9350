"""OTLP export to a local collector: one trace across processes, metrics, no harm without it."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_rpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_rpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from expertmesh.runtime.telemetry import configure, inject


class Collector:
    """Keeps what arrives over OTLP."""

    def __init__(self) -> None:
        self.spans: dict[str, Span] = {}
        self.service_of: dict[str, str] = {}
        self.metrics: dict[str, Any] = {}


class TraceService(trace_rpc.TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self._collector.spans[span.name] = span
                    self._collector.service_of[span.name] = attributes["service.name"]
        return trace_pb.ExportTraceServiceResponse()


class MetricsService(metrics_rpc.MetricsServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                self._collector.metrics |= {metric.name: metric for metric in scope.metrics}
        return metrics_pb.ExportMetricsServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    received = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    add_trace: Any = trace_rpc.add_TraceServiceServicer_to_server
    add_trace(TraceService(received), server)
    add_metrics: Any = metrics_rpc.add_MetricsServiceServicer_to_server
    add_metrics(MetricsService(received), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield received, f"http://127.0.0.1:{port}"
    server.stop(None)


# The callee: gets the caller's traceparent as a servicer would from a message, computes a batch.
EXPERT = """
import sys, time
from expertmesh.runtime.telemetry import configure
endpoint, traceparent = sys.argv[1:]
telemetry = configure("expert", endpoint, instance="g0-1")
with telemetry.span("expert.batch", {"rows": 7}, links=[traceparent]):
    start_ns = time.time_ns()
    telemetry.metrics.batch_rows.record(7, "g0")
telemetry.record("expert.compute", start_ns, time.time_ns(), {"group": "g0"}, parent=traceparent)
try:
    with telemetry.span("expert.reply", parent=traceparent):
        raise OSError("stream closed")
except OSError:
    pass
telemetry.shutdown()
"""


def run_expert(endpoint: str, traceparent: str) -> None:
    subprocess.run([sys.executable, "-c", EXPERT, endpoint, traceparent], check=True, timeout=60)


def test_one_trace_spans_two_processes(collector: tuple[Collector, str]) -> None:
    received, endpoint = collector
    telemetry = configure("router", endpoint)
    assert telemetry.enabled
    with telemetry.span("router.forward"), telemetry.span("router.dispatch", {"layer": 3}) as span:
        span.set_attribute("rows", 7)
        run_expert(endpoint, inject())
    telemetry.shutdown()

    forward, dispatch = received.spans["router.forward"], received.spans["router.dispatch"]
    compute, batch = received.spans["expert.compute"], received.spans["expert.batch"]
    reply = received.spans["expert.reply"]
    assert not forward.parent_span_id
    assert dispatch.parent_span_id == forward.span_id
    assert compute.parent_span_id == reply.parent_span_id == dispatch.span_id
    assert {s.trace_id for s in (forward, dispatch, compute, reply)} == {forward.trace_id}
    assert dispatch.start_time_unix_nano < compute.start_time_unix_nano
    assert compute.start_time_unix_nano < compute.end_time_unix_nano < dispatch.end_time_unix_nano
    assert [link.span_id for link in batch.links] == [dispatch.span_id]
    assert {a.key: a.value.int_value for a in dispatch.attributes} == {"layer": 3, "rows": 7}
    assert reply.status.code == Status.STATUS_CODE_ERROR
    assert "stream closed" in reply.events[0].attributes[1].value.string_value
    assert received.service_of["router.dispatch"] == "expertmesh.router"
    assert received.service_of["expert.compute"] == "expertmesh.expert"


def test_unsampled_traces_stay_unsampled_everywhere(collector: tuple[Collector, str]) -> None:
    received, endpoint = collector
    telemetry = configure("router", endpoint, sample_frac=0.0)
    with telemetry.span("router.forward"):
        flags = int(inject()[-2:], 16)
        assert flags & 1 == 0
        run_expert(endpoint, inject())
    telemetry.shutdown()
    assert received.spans.keys() == {"expert.batch"}, "the batch is a trace of its own"


def test_metrics_arrive_with_unit_labels_and_buckets(collector: tuple[Collector, str]) -> None:
    received, endpoint = collector
    telemetry = configure("router", endpoint.removeprefix("http://"))
    metrics = telemetry.metrics
    metrics.rows.add(12, "router", "g0")
    metrics.rows.add(5, "router", "g0")
    metrics.in_flight_rows.add(4, "router", "g0")
    metrics.in_flight_rows.add(-3, "router", "g0")
    metrics.errors.add(1, "router", "UNAVAILABLE")
    metrics.queue_wait.record(0.002, "expert", "g0")
    telemetry.shutdown()

    rows = received.metrics["expertmesh.rows"]
    point = rows.sum.data_points[0]
    assert (rows.unit, rows.sum.is_monotonic, point.as_int) == ("{row}", True, 17)
    assert labels(point) == {"stage": "router", "group": "g0"}
    level = received.metrics["expertmesh.in_flight_rows"].sum
    assert (level.is_monotonic, level.data_points[0].as_int) == (False, 1)
    errors = received.metrics["expertmesh.errors"].sum.data_points[0]
    assert labels(errors)["code"] == "UNAVAILABLE"
    waited = received.metrics["expertmesh.queue_wait"].histogram.data_points[0]
    assert (waited.count, waited.sum) == (1, 0.002)
    assert waited.bucket_counts[list(waited.explicit_bounds).index(0.0025)] == 1
    assert "expertmesh.tokens" not in received.metrics, "what never happened is not sent"
    assert metrics.queue_wait.read()[("expert", "g0")].num == 1


def labels(point: Any) -> dict[str, str]:
    return {attribute.key: attribute.value.string_value for attribute in point.attributes}


def test_a_collector_that_is_away_costs_neither_errors_nor_time() -> None:
    code = """
import json, time
from expertmesh.runtime.telemetry import configure
telemetry = configure("router", "http://127.0.0.1:9")
start_s = time.perf_counter()
for _ in range(5000):
    with telemetry.span("router.dispatch"):
        telemetry.metrics.rows.add(1, "router", "g0")
work_s = time.perf_counter() - start_s
start_s = time.perf_counter()
telemetry.shutdown(0.5)
print(json.dumps([work_s, time.perf_counter() - start_s]))
"""
    start_s = time.monotonic()
    out = subprocess.check_output(
        [sys.executable, "-c", code], text=True, stderr=subprocess.DEVNULL, timeout=60
    )
    work_s, shutdown_s = json.loads(out)
    assert work_s < 10
    assert shutdown_s < 2
    assert time.monotonic() - start_s < 40, "the process ends although nothing was delivered"
