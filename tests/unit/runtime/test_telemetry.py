"""Telemetry without a collector: costs nothing, counts everything, and passes trace context on."""

import io
import json
import logging
import subprocess
import sys
import threading
import timeit
from collections.abc import Iterator

import pytest
from opentelemetry import trace

from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.json_logs import setup_logging
from expertmesh.runtime.metrics import Metrics
from expertmesh.runtime.telemetry import Telemetry, configure
from expertmesh.runtime.trace_context import TRACEPARENT, extract, inject, traceparent_of

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


@pytest.fixture
def parent_span() -> Iterator[None]:
    """Code under test runs inside the remote span PARENT, as in a servicer."""
    with trace.use_span(trace.get_current_span(extract(PARENT))):
        yield


def test_without_an_endpoint_nothing_is_traced_or_installed() -> None:
    telemetry = configure("router")
    assert not telemetry.enabled
    with telemetry.span("router.dispatch", {"layer": 3}, parent=PARENT) as span:
        span.set_attribute("rows", 12)
        assert not span.is_recording()
        assert inject() == ""
    telemetry.record("expert.compute", 1, 2, parent=PARENT)
    telemetry.shutdown()


def test_without_an_endpoint_errors_pass_through_a_span() -> None:
    with pytest.raises(KeyError, match="lost"), configure("router").span("router.dispatch"):
        raise KeyError("lost")


def test_without_an_endpoint_the_sdk_is_not_even_imported() -> None:
    code = (
        "import sys; from expertmesh.runtime.telemetry import configure; configure('router');"
        "print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_span_that_goes_nowhere_costs_next_to_nothing() -> None:
    telemetry = configure("router")

    def span() -> None:
        with telemetry.span("router.dispatch"):
            pass

    best_s = min(timeit.repeat(span, number=1000, repeat=20)) / 1000
    assert best_s < 5e-6, "0.2 us measured; the limit allows for a busy machine"


@pytest.mark.parametrize(
    "endpoint",
    ["collector", "collector:", ":4317", "grpc://collector:4317", "http://x", "http://x:y"],
)
def test_a_wrong_endpoint_names_the_field(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint: expected host:port"):
        configure("router", endpoint)


@pytest.mark.usefixtures("parent_span")
def test_trace_context_goes_round_by_string_and_by_metadata() -> None:
    assert inject() == PARENT
    assert traceparent_of(((TRACEPARENT, inject()),)) == PARENT


@pytest.mark.parametrize("metadata", [None, (), (("x", "y"), ("traceparent-bin", b"z"))])
def test_a_caller_without_trace_context_gives_none(
    metadata: tuple[tuple[str, str | bytes], ...] | None,
) -> None:
    assert traceparent_of(metadata) == ""


@pytest.mark.parametrize("garbage", ["", "nonsense", "00-0-0-00", PARENT[:-1], "\0" * 60])
def test_a_malformed_traceparent_starts_a_new_trace(garbage: str) -> None:
    assert not trace.get_current_span(extract(garbage)).get_span_context().is_valid


def test_every_metric_has_a_name_a_unit_and_a_description() -> None:
    metrics = Metrics()
    specs = [counter.spec for counter in metrics.counters()]
    specs += [histogram.spec for histogram in metrics.histograms()]
    assert len({spec.name for spec in specs}) == len(specs) == 27
    for spec in specs:
        assert spec.name.startswith("expertmesh.")
        assert spec.unit == "s" or spec.unit.strip("{}").isalpha()
        assert spec.description
        assert spec.labels


def test_counters_are_read_by_label() -> None:
    metrics = Metrics()
    metrics.rows.add(3, "router", "g0")
    metrics.rows.add(4, "router", "g0")
    metrics.rows.add(1, "expert", "g0")
    metrics.in_flight_rows.add(5, "router", "g1")
    metrics.in_flight_rows.add(-5, "router", "g1")
    assert metrics.rows.read() == {("router", "g0"): 7, ("expert", "g0"): 1}
    assert metrics.rows.get("router", "g0") == 7
    assert metrics.rows.get("gateway", "g0") == 0
    assert metrics.in_flight_rows.get("router", "g1") == 0


def test_shares_are_part_of_the_total() -> None:
    metrics = Metrics()
    shares = [metrics.rows.share("router", "g0") for _ in range(2)]
    metrics.rows.add(1, "router", "g0")
    for share in shares:
        share.value += 3
    assert metrics.rows.read() == {("router", "g0"): 7}
    assert metrics.rows.get("router", "g0") == 7


def test_shares_of_a_histogram_are_part_of_the_distribution() -> None:
    metrics = Metrics()
    shares = [metrics.compute_time.share("g0") for _ in range(2)]
    assert metrics.compute_time.get("g0") is None
    metrics.compute_time.record(0.5, "g0")
    shares[0].add(0.25)
    shares[1].add(3.0)
    assert metrics.compute_time.read() == {("g0",): (3, 3.75, 3.0)}
    own = metrics.compute_time.buckets()[("g0",)]
    assert (own.num, sum(own.counts), own.min, own.max) == (3, 3, 0.25, 3.0)


def test_distributions_keep_number_sum_and_largest() -> None:
    metrics = Metrics()
    for seconds in (0.1, 0.4, 0.1):
        metrics.compute_time.record(seconds, "g0")
    distribution = metrics.compute_time.read()[("g0",)]
    assert (distribution.num, distribution.max) == (3, 0.4)
    assert distribution.mean == pytest.approx(0.2)
    assert metrics.compute_time.get("g1") is None


def test_counting_from_many_threads_loses_nothing() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(5000):
            metrics.rows.add(1, "expert", "g0")
            metrics.batch_rows.record(2, "g0")

    threads = [threading.Thread(target=count) for _ in range(4)]
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval_s)
    assert metrics.rows.get("expert", "g0") == 20_000
    assert metrics.batch_rows.read()[("g0",)] == (20_000, 40_000, 2)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_carry_extra_fields_and_exceptions(log: io.StringIO) -> None:
    setup_logging("info", json=True, stream=log)
    logging.getLogger("expertmesh.test").debug("not this")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("expertmesh.test").exception("layer %d", 3, extra={"group": "g0"})
    line = json.loads(log.getvalue())
    assert (line["level"], line["logger"]) == ("ERROR", "expertmesh.test")
    assert (line["message"], line["group"]) == ("layer 3", "g0")
    assert "ValueError: broken" in line["exception"]
    assert line["time"].endswith("+00:00")
    assert "trace_id" not in line


@pytest.mark.usefixtures("parent_span")
@pytest.mark.parametrize("json_lines", [True, False])
def test_log_lines_carry_the_trace_id(log: io.StringIO, json_lines: bool) -> None:
    setup_logging("INFO", json=json_lines, stream=log)
    logging.getLogger("expertmesh.test").info("dispatched")
    assert TRACE_ID in log.getvalue()
    if json_lines:
        assert json.loads(log.getvalue())["trace_id"] == TRACE_ID


def test_setting_up_twice_replaces_our_handler_and_keeps_others(log: io.StringIO) -> None:
    other = logging.NullHandler()
    logging.getLogger().addHandler(other)
    setup_logging("DEBUG", stream=io.StringIO())
    setup_logging("WARNING", stream=log)
    logging.getLogger("expertmesh.test").info("too quiet")
    logging.getLogger("expertmesh.test").warning("once")
    assert log.getvalue().count("\n") == 1
    assert log.getvalue().rstrip().endswith("WARNING expertmesh.test once")
    assert other in logging.getLogger().handlers


def test_an_unknown_level_names_the_field() -> None:
    with pytest.raises(ConfigError, match=r"log\.level: expected one of DEBUG.*'loud'"):
        setup_logging("loud")


def test_shutdown_passes_its_deadline_on_once() -> None:
    calls: list[float] = []
    telemetry = Telemetry(Metrics(), shut_down=calls.append)
    telemetry.shutdown(0.5)
    telemetry.shutdown(0.5)
    assert calls == [0.5]
