"""OTLP export to a local collector: one trace across processes, metrics, no harm without it."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from chaos.collector import Collector, collecting
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from expertmesh.runtime.telemetry import configure
from expertmesh.runtime.trace_context import inject


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    with collecting() as running:
        yield running


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
    telemetry = configure("router", endpoint, sample_frac=1e-12)
    with telemetry.span("router.forward"):
        flags = int(inject()[-2:], 16)
        assert flags & 1 == 0
        run_expert(endpoint, inject())
    telemetry.shutdown()
    assert received.spans.keys() == {"expert.batch"}, "the batch is a trace of its own"


def test_where_no_trace_begins_only_a_callers_is_recorded(
    collector: tuple[Collector, str],
) -> None:
    received, endpoint = collector
    telemetry = configure("expert", endpoint, sample_frac=0.0)
    with telemetry.span("expert.alone"):
        assert inject() == ""
        assert telemetry.start("expert.below")[1] == ""
    with telemetry.span("expert.asked", parent=f"00-{'1' * 32}-{'2' * 16}-01"):
        telemetry.start("expert.below")[0].end()
    telemetry.shutdown()
    assert received.spans.keys() == {"expert.asked", "expert.below"}


def test_a_share_of_the_traces_is_at_most_one_a_second(collector: tuple[Collector, str]) -> None:
    received, endpoint = collector
    telemetry = configure("router", endpoint, sample_frac=0.999999)
    for number in range(100):
        with telemetry.span(f"router.{number}"):
            pass
    telemetry.shutdown()
    assert len(received.spans) == 1


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
