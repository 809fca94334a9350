"""What waits for a replica that takes nothing is bounded, and what nobody wants is not sent."""

import pytest

from expertmesh.router.outgoing import Outgoing
from expertmesh.runtime.errors import QueueFull


def test_messages_leave_in_order_unless_nobody_wants_them() -> None:
    wanted = {1, 3}
    outgoing = Outgoing(wanted.__contains__, 100)
    for number in (1, 2, 3):
        outgoing.add(number, bytes([number]) * 10)
    assert outgoing.num_bytes == 30
    assert [outgoing.next(), outgoing.next(), outgoing.next()] == [b"\1" * 10, b"\3" * 10, None]
    assert outgoing.num_bytes == 0


def test_the_bound_counts_only_what_is_wanted() -> None:
    wanted = {1, 2}
    outgoing = Outgoing(wanted.__contains__, 100)
    outgoing.check_room(1000)  # one message always finds room
    outgoing.add(1, bytes(60))
    outgoing.check_room(40)
    outgoing.add(2, bytes(40))
    with pytest.raises(QueueFull, match="100 bytes wait for a replica that takes none, of 100"):
        outgoing.check_room(1)
    wanted.remove(1)
    outgoing.check_room(60)
    assert outgoing.num_bytes == 40
    with pytest.raises(QueueFull):
        outgoing.check_room(61)
    wanted.clear()
    outgoing.check_room(1000)
    assert outgoing.next() is None
