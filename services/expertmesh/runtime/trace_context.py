"""Trace context of a process: the current span as one W3C `traceparent` string, and the spans that
stand for what is not recorded.

https://www.w3.org/TR/trace-context/; it travels in gRPC metadata for calls, in a message field on
streams.
"""

import random
import re
from collections.abc import Iterable, Sequence
from types import TracebackType

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

TRACEPARENT = "traceparent"

_W3C = TraceContextTextMapPropagator()


class NoSpan:
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


class Unsampled(NonRecordingSpan):
    """The outermost span of what is not recorded here: it has a trace id, for the log and for
    callees that decide for themselves. Made for every call, so what hardly anybody asks for is
    built when asked for.
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
        return f"Unsampled({self.traceparent!r})"


NO_SPAN = NoSpan()
"""For what is known not to be recorded."""
_NOWHERE = Context()
is_unsampled = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f][02468ace]").fullmatch


def inject() -> str:
    """The current span as a traceparent, or "" outside of a recorded trace."""
    return traceparent_in(None)


def traceparent_in(context: Context | None) -> str:
    """The span of a context as a traceparent; None: the current context."""
    span = trace.get_current_span(context)
    if isinstance(span, Unsampled):
        return span.traceparent
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, context)
    return carrier.get(TRACEPARENT, "")


def extract(traceparent: str) -> Context:
    """The context a traceparent stands for; an empty context if it is empty or malformed."""
    return _W3C.extract({TRACEPARENT: traceparent})


def traceparent_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The caller's traceparent from a servicer's `context.invocation_metadata()`, or ""."""
    for key, value in metadata or ():
        if key == TRACEPARENT and isinstance(value, str):
            return value
    return ""


def sampled_first(parent: str, links: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Work shared by several callers is recorded if one of them is; that one is its parent."""
    if not is_unsampled(parent):
        return parent, links
    others = [link for link in links if not is_unsampled(link)]
    return (others[0], others[1:]) if others else (parent, ())


def links_to(traceparents: Sequence[str]) -> list[Link] | None:
    """Links to the spans of these traceparents, as far as they are well formed."""
    if not traceparents:
        return None
    spans = [trace.get_current_span(extract(traceparent)) for traceparent in traceparents]
    contexts = [span.get_span_context() for span in spans]
    return [Link(context) for context in contexts if context.is_valid]
