"""Traces and metrics of a process: OpenTelemetry with an endpoint, next to nothing without.

Write `with telemetry.span("router.dispatch", {"layer": 3}) as span:` anywhere; on the hottest
paths, where even building the attributes counts, ask `if telemetry.enabled:` first.
"""

import os
import random
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Tracer
from opentelemetry.util.types import AttributeValue

from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.metrics import Metrics
from expertmesh.runtime.trace_context import (
    NO_SPAN,
    NoSpan,
    Unsampled,
    extract,
    is_unsampled,
    links_to,
    sampled_first,
    traceparent_in,
)

Attributes = Mapping[str, AttributeValue]

_NO_ATTRIBUTES: Attributes = {}
_BETWEEN_TRACES_S = 1.0
"""At least, between the beginnings of two traces of a process that records a share of them."""


class Telemetry:
    """Spans and metrics of one process; build it with `configure`."""

    __slots__ = ("_next_trace_s", "_sample_frac", "_shut_down", "_tracer", "enabled", "metrics")

    def __init__(
        self,
        metrics: Metrics,
        tracer: Tracer | None = None,
        shut_down: Callable[[float], None] | None = None,
        sample_frac: float = 1.0,
    ) -> None:
        self.metrics = metrics
        self.enabled = tracer is not None
        """Whether spans go anywhere."""
        self._tracer = tracer
        self._sample_frac = sample_frac
        self._next_trace_s = 0.0
        self._shut_down = shut_down

    def _unsampled(self, parent: str) -> NoSpan | Unsampled | None:
        """What stands for a span that is not recorded: so says its parent, or the dice if its trace
        begins here."""
        if parent:
            return Unsampled(parent) if is_unsampled(parent) else None
        if not self._sample_frac:
            return None if self.is_recording() else NO_SPAN
        current = trace.get_current_span()
        if isinstance(current, Unsampled):
            return NO_SPAN
        if current.get_span_context().is_valid or self._sample_frac >= 1:
            return None
        sampled = random.random() < self._sample_frac and self._may_begin()
        return None if sampled else Unsampled()

    def _may_begin(self) -> bool:
        """Whether a trace may begin now: recording one costs more than a layer call does."""
        now_s = time.monotonic()
        if now_s < self._next_trace_s:
            return False
        self._next_trace_s = now_s + _BETWEEN_TRACES_S
        return True

    def is_recording(self) -> bool:
        """Whether the current span is recorded; a span below it would be, too."""
        return self.enabled and trace.get_current_span().is_recording()

    def span(
        self,
        name: str,
        attributes: Attributes = _NO_ATTRIBUTES,
        *,
        parent: str = "",
        links: Sequence[str] = (),
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> AbstractContextManager[Span]:
        """A span around a block, current inside it; an exception leaving the block marks it failed.

        Args:
            name: "stage.step", for example "router.dispatch".
            attributes: facts about it, known at its start.
            parent: traceparent of a span of another process; default the current span.
            links: traceparents of related spans, such as the callers that share a batch.
        """
        if self._tracer is None:
            return NO_SPAN
        if parent and links:
            parent, links = sampled_first(parent, links)
        if unsampled := self._unsampled(parent):
            return unsampled
        return self._tracer.start_as_current_span(
            name,
            context=extract(parent) if parent else None,
            kind=kind,
            attributes=attributes,
            links=links_to(links),
        )

    def start(self, name: str, *, kind: SpanKind = SpanKind.INTERNAL) -> tuple[Span, str]:
        """(a child of the current span, its traceparent); the caller ends it.

        For work that others do at the same time in the same task: it is nobody's current span.
        Unless `is_recording`, nothing is recorded and the traceparent is "".
        """
        if self._tracer is None or not self.is_recording():
            return trace.INVALID_SPAN, ""
        span = self._tracer.start_span(name, kind=kind)
        return span, traceparent_in(trace.set_span_in_context(span))

    def record(
        self,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: Attributes = _NO_ATTRIBUTES,
        *,
        parent: str = "",
        links: Sequence[str] = (),
    ) -> None:
        """A span that is over: one caller's share of a batch, in that caller's own trace.

        Args:
            start_ns, end_ns: wall clock (`time.time_ns`).
        """
        if self._tracer is None or self._unsampled(parent):
            return
        span = self._tracer.start_span(
            name,
            context=extract(parent) if parent else None,
            attributes=attributes,
            links=links_to(links),
            start_time=start_ns,
        )
        span.end(end_ns)

    def shutdown(self, timeout_s: float = 5.0) -> None:
        """Send what is left and stop. Blocks up to about `timeout_s`; further calls do nothing."""
        shut_down, self._shut_down = self._shut_down, None
        if shut_down is not None:
            shut_down(timeout_s)


def configure(
    service_name: str,
    otlp_endpoint: str | None = None,
    *,
    instance: str = "",
    sample_frac: float = 1.0,
    export_interval_s: float = 5.0,
) -> Telemetry:
    """The telemetry of this process. Touches nothing global; imports the SDK only with an endpoint.

    Args:
        service_name: "gateway", "router", "expert", ...; "expertmesh." is put before it.
        otlp_endpoint: OTLP gRPC collector, "host:4317" (plain) or "https://host:4317"; None: no
            export.
        instance: tells processes of one service apart, such as a replica id; default host:pid.
        sample_frac: share of traces recorded, decided where a trace begins; below 1 at most one a
            second. 0 where none begins: only what a caller records is recorded.
        export_interval_s: longest time spans and metrics wait before they are sent.

    Raises:
        ConfigError: the endpoint has no host or no port.
    """
    metrics = Metrics()
    if not otlp_endpoint:
        return Telemetry(metrics)
    from expertmesh.runtime.otlp import ExportSettings, start_export

    settings = ExportSettings(
        service_name=f"expertmesh.{service_name}",
        instance=instance or f"{socket.gethostname()}:{os.getpid()}",
        endpoint=endpoint_url(otlp_endpoint),
        interval_s=export_interval_s,
    )
    tracer, shut_down = start_export(settings, metrics)
    return Telemetry(metrics, tracer, shut_down, sample_frac)


def endpoint_url(endpoint: str) -> str:
    """The collector's URL; ConfigError if it has no host or no port."""
    url = endpoint if "://" in endpoint else f"http://{endpoint}"
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port:
            return url
    except ValueError:  # a port that is not a number
        pass
    raise ConfigError.of(
        "otlp_endpoint",
        expected="host:port, http://host:port or https://host:port",
        got=repr(endpoint),
    )
