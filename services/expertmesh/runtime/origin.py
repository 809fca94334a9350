"""Whose work it is and how urgent: what queues are ordered by."""

from contextvars import ContextVar
from enum import IntEnum
from typing import Any, NamedTuple

from expertmesh.runtime.errors import InvalidInput
from expertmesh.v1 import priority_pb2

MAX_CALLER_CHARS = 128
"""What is longer is cut: names are compared, kept and sent with every message."""


class Priority(IntEnum):
    """Who goes first; the values are those of the wire."""

    INTERACTIVE = priority_pb2.PRIORITY_INTERACTIVE
    BATCH = priority_pb2.PRIORITY_BATCH
    __hash__ = int.__hash__  # Enum's is written in Python, and origins are keys on every call


class Origin(NamedTuple):
    """A caller and the priority of its call."""

    caller: str = ""
    priority: Priority = Priority.INTERACTIVE

    @property
    def wire_priority(self) -> "priority_pb2.Priority.ValueType":
        """What is usual costs no bytes."""
        if self.priority is Priority.INTERACTIVE:
            return priority_pb2.PRIORITY_UNSPECIFIED
        return priority_pb2.PRIORITY_BATCH


ANYONE = Origin()


def priority_of(value: int) -> Priority:
    """What the wire says; unspecified is interactive.

    Raises:
        InvalidInput: no such priority.
    """
    if value == priority_pb2.PRIORITY_UNSPECIFIED:
        return Priority.INTERACTIVE
    if value not in (Priority.INTERACTIVE, Priority.BATCH):
        known = ", ".join(priority_pb2.Priority.keys())
        raise InvalidInput.of("priority", expected=f"one of {known}", got=value)
    return Priority(value)


authenticated_name: ContextVar[str] = ContextVar("authenticated_name", default="")
"""Of the call that is being served, as its guard knows it; "" without one."""


def caller_of(context: Any) -> str:
    """Who is at the other end of a gRPC call: by its token, else the name in its certificate, else
    its connection."""
    if name := authenticated_name.get():
        return name[:MAX_CALLER_CHARS]
    for name in context.auth_context().get("x509_common_name", ()):
        return str(name.decode("utf-8", "replace"))[:MAX_CALLER_CHARS]
    return str(context.peer())[:MAX_CALLER_CHARS]
