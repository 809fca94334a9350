"""Traces and metrics of a process: OpenTelemetry with an endpoint, next to nothing without.

Write `with telemetry.span("router.dispatch", {"layer": 3}) as span:` anywhere; on the hottest
paths, where even building the attributes counts, ask `if telemetry.enabled:` first. Trace context
travels as one W3C `traceparent` string (https://www.w3.org/TR/trace-context/): in gRPC metadata for
calls, in a message field on streams.
"""

import os
import random
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.metrics import Metrics

TRACEPARENT = "traceparent"
Attributes = Mapping[str, AttributeValue]
Metadata = tuple[tuple[str, str], ...]

_W3C = TraceContextTextMapPropagator()
_NO_ATTRIBUTES: Attributes = {}


class _NoSpan:
    """The span of a process that does not trace: shared, stateless, free of cost."""

    __slots__ = ()

    def __enter__(self) -> Span:
        return trace.INVALID_SPAN

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None


class _Unsampled(NonRecordingSpan):
    """A span that is not recorded but has a trace id, for the log and for callees: they record
    nothing either. Made for every call, so what hardly anybody asks for is built when asked for.
    """

    def __init__(self, traceparent: str = "") -> None:
        self._traceparent = traceparent

    @property
    def traceparent(self) -> str:
        """Of the span it stands under, or of a trace that begins here."""
        if not self._traceparent:
            trace_id, span_id = random.getrandbits(128) or 1, random.getrandbits(64) or 1
            self._traceparent = f"00-{trace_id:032x}-{span_id:016x}-00"
        return self._traceparent

    def get_span_context(self) -> SpanContext:
        """Parsed from the traceparent."""
        return trace.get_current_span(extract(self.traceparent)).get_span_context()

    def __enter__(self) -> Span:
        self._token = attach(trace.set_span_in_context(self, _NOWHERE))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        detach(self._token)

    def __repr__(self) -> str:
        return f"_Unsampled({self.traceparent!r})"


_NO_SPAN = _NoSpan()
_NOWHERE = Context()
_is_unsampled = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f][02468ace]").fullmatch


def inject() -> str:
    """The current span as a traceparent, or "" outside of a recorded trace."""
    return _traceparent(None)


def _traceparent(context: Context | None) -> str:
    span = trace.get_current_span(context)
    if isinstance(span, _Unsampled):
        return span.traceparent
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, context)
    return carrier.get(TRACEPARENT, "")


def extract(traceparent: str) -> Context:
    """The context a traceparent stands for; an empty context if it is empty or malformed."""
    return _W3C.extract({TRACEPARENT: traceparent})


def call_metadata() -> Metadata:
    """What a gRPC client adds to its metadata so that the callee's spans join its trace."""
    traceparent = inject()
    return ((TRACEPARENT, traceparent),) if traceparent else ()


def traceparent_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The caller's traceparent from a servicer's `context.invocation_metadata()`, or ""."""
    for key, value in metadata or ():
        if key == TRACEPARENT and isinstance(value, str):
            return value
    return ""


class Telemetry:
    """Spans and metrics of one process; build it with `configure`."""

    __slots__ = ("_sample_frac", "_shut_down", "_tracer", "enabled", "metrics")

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
        self._shut_down = shut_down

    def _unsampled(self, parent: str) -> _Unsampled | None:
        """What stands for a span that is not recorded: so says its parent, or the dice if its trace
        begins here."""
        if parent:
            return _Unsampled(parent) if _is_unsampled(parent) else None
        current = trace.get_current_span()
        if isinstance(current, _Unsampled):
            return _Unsampled(current.traceparent)
        if current.get_span_context().is_valid or self._sample_frac >= 1:
            return None
        return None if random.random() < self._sample_frac else _Unsampled()

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
            return _NO_SPAN
        if parent and links:
            parent, links = _sampled_first(parent, links)
        if unsampled := self._unsampled(parent):
            return unsampled
        return self._tracer.start_as_current_span(
            name,
            context=extract(parent) if parent else None,
            kind=kind,
            attributes=attributes,
            links=_links(links),
        )

    def start(self, name: str, *, kind: SpanKind = SpanKind.INTERNAL) -> tuple[Span, str]:
        """(a child of the current span, its traceparent); the caller ends it.

        For work that others do at the same time in the same task: it is nobody's current span.
        """
        if self._tracer is None:
            return trace.INVALID_SPAN, ""
        if unsampled := self._unsampled(""):
            return unsampled, unsampled.traceparent
        span = self._tracer.start_span(name, kind=kind)
        return span, _traceparent(trace.set_span_in_context(span))

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
            links=_links(links),
            start_time=start_ns,
        )
        span.end(end_ns)

    def shutdown(self, timeout_s: float = 5.0) -> None:
        """Send what is left and stop. Blocks up to about `timeout_s`; further calls do nothing."""
        shut_down, self._shut_down = self._shut_down, None
        if shut_down is not None:
            shut_down(timeout_s)


def _sampled_first(parent: str, links: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Work shared by several callers is recorded if one of them is; that one is its parent."""
    if not _is_unsampled(parent):
        return parent, links
    others = [link for link in links if not _is_unsampled(link)]
    return (others[0], others[1:]) if others else (parent, ())


def _links(traceparents: Sequence[str]) -> list[Link] | None:
    if not traceparents:
        return None
    spans = [trace.get_current_span(extract(traceparent)) for traceparent in traceparents]
    contexts = [span.get_span_context() for span in spans]
    return [Link(context) for context in contexts if context.is_valid]


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
        sample_frac: share of traces recorded, decided where a trace begins.
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
