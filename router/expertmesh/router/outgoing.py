"""Messages to a replica that it has not taken yet, bounded in bytes."""

from collections import deque
from collections.abc import Callable

from expertmesh.runtime.errors import QueueFull

MAX_UNSENT_BYTES = 64 << 20
"""What waits for a replica that takes nothing; beyond it other copies are asked. One message always
finds room."""
_RETRY_S = 0.5
"""Nobody knows when it will take something again; soon the router will have given it up."""


class Outgoing:
    """First in, first out; what nobody wants any more is never sent.

    Args:
        is_wanted: whether the message of a number should still be sent.
    """

    def __init__(self, is_wanted: Callable[[int], bool], max_bytes: int = MAX_UNSENT_BYTES) -> None:
        self._is_wanted = is_wanted
        self._max_bytes = max_bytes
        self._messages: deque[tuple[int, bytes]] = deque()
        self.num_bytes = 0

    def check_room(self, num_bytes: int) -> None:
        """Make sure that a message of that size may be added.

        Raises:
            QueueFull: too much waits already.
        """
        if self.num_bytes and self.num_bytes + num_bytes > self._max_bytes:
            self._drop_unwanted()
            if self.num_bytes and self.num_bytes + num_bytes > self._max_bytes:
                raise QueueFull(
                    f"{self.num_bytes} bytes wait for a replica that takes none, of "
                    f"{self._max_bytes} at most; ask another one, or retry later",
                    unsent_bytes=self.num_bytes,
                    max_unsent_bytes=self._max_bytes,
                ).after(_RETRY_S)

    def add(self, number: int, data: bytes) -> None:
        """At the end."""
        self._messages.append((number, data))
        self.num_bytes += len(data)

    def next(self) -> bytes | None:
        """The next message that is still wanted, which leaves; None if there is none."""
        while self._messages:
            number, data = self._messages.popleft()
            self.num_bytes -= len(data)
            if self._is_wanted(number):
                return data
        return None

    def _drop_unwanted(self) -> None:
        self._messages = deque(own for own in self._messages if self._is_wanted(own[0]))
        self.num_bytes = sum(len(data) for _, data in self._messages)
