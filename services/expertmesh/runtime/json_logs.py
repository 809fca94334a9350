"""Logging of a process: one line a record, text for people or JSON for machines, with trace ids."""

import json as jsonlib
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

from opentelemetry import trace

from expertmesh.runtime.errors import ConfigError

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_TEXT = "%(asctime)s %(levelname)s %(name)s%(trace)s %(message)s"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "trace_id", "trace"}


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, so that a second set-up replaces the first and leaves others alone."""


def _add_trace_id(record: logging.LogRecord) -> bool:
    context = trace.get_current_span().get_span_context()
    trace_id = trace.format_trace_id(context.trace_id) if context.is_valid else ""
    record.__dict__.update(trace_id=trace_id, trace=f" trace={trace_id}" if trace_id else "")
    return True


class _JsonFormatter(logging.Formatter):
    """time, level, logger, message, trace_id if any, fields given as `extra`, exception if any."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if trace_id := getattr(record, "trace_id", ""):
            fields["trace_id"] = trace_id
        fields |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return jsonlib.dumps(fields, default=str)


def setup_logging(level: str = "INFO", json: bool = False, stream: TextIO | None = None) -> None:
    """Log from `level` up to `stream` (default stderr); calling again replaces the set-up.

    Raises:
        ConfigError: not a level.
    """
    if level.upper() not in _LEVELS:
        raise ConfigError.of("log.level", expected=f"one of {', '.join(_LEVELS)}", got=repr(level))
    handler = _Handler(stream or sys.stderr)
    handler.addFilter(_add_trace_id)
    handler.setFormatter(_JsonFormatter() if json else logging.Formatter(_TEXT))
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
