"""Whose turn it is: start-time fair queueing between callers, interactive work before batch work.

Pure: time is passed in. Each caller's work counts in rows. Virtual time is the start tag of what is
served; a caller's next work starts where its last one finished, or now if that is later, and the
lowest start tag is served first (Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996).
Start tags are given when work comes to the head of its caller's line, so that work which leaves
the queue unserved costs its caller nothing.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from expertmesh.runtime.origin import Origin, Priority

_MOST_TOGETHER = 1024
"""Works of one caller that are looked at for one batch."""


@dataclass(eq=False)
class Queued:
    """Work that waits. Only works of one kind are served together."""

    origin: Origin
    kind: int
    num_rows: int
    num_bytes: int
    arrived_at: float = field(default=0.0, init=False)
    """Virtual time of its arrival."""
    number: int = field(default=0, init=False)
    """In the order of arrival; 0 when it does not wait."""


Q = TypeVar("Q", bound=Queued)


class _Flow(Generic[Q]):
    """The works of one caller, by kind, oldest first."""

    def __init__(self) -> None:
        self.finish = 0.0
        """Virtual time at which its last served work finished."""
        self.num_rows = 0
        self.num_bytes = 0
        self.kinds: dict[int, OrderedDict[int, Q]] = {}

    def add(self, item: Q) -> None:
        self.kinds.setdefault(item.kind, OrderedDict())[item.number] = item
        self.num_rows += item.num_rows
        self.num_bytes += item.num_bytes

    def remove(self, item: Q) -> None:
        own = self.kinds[item.kind]
        del own[item.number]
        if not own:
            del self.kinds[item.kind]
        self.num_rows -= item.num_rows
        self.num_bytes -= item.num_bytes

    def start(self, item: Q) -> float:
        return max(item.arrived_at, self.finish)

    def oldest(self) -> Q:
        firsts = (next(iter(own.values())) for own in self.kinds.values())
        return min(firsts, key=lambda item: item.number)

    def newest_first(self) -> Iterator[Q]:
        lines = (reversed(own.values()) for own in self.kinds.values())
        return heapq.merge(*lines, key=lambda item: -item.number)


class _Lane(Generic[Q]):
    """The callers of one priority."""

    def __init__(self) -> None:
        self.now = 0.0
        """Virtual time, in rows."""
        self.num_rows = 0
        self.flows: dict[str, _Flow[Q]] = {}
        """Callers with work, and those that are ahead of their share."""
        self.waits_since_s = 0.0
        """When it last had a turn, or got its first work."""

    def is_empty(self) -> bool:
        return not any(flow.kinds for flow in self.flows.values())

    def add(self, item: Q, now_s: float) -> None:
        if self.is_empty():
            self.waits_since_s = now_s
        item.arrived_at = self.now
        self.flows.setdefault(item.origin.caller, _Flow()).add(item)
        self.num_rows += item.num_rows

    def remove(self, item: Q) -> None:
        self.flows[item.origin.caller].remove(item)
        self.num_rows -= item.num_rows
        if self.is_empty():  # the end of a busy period: nobody is ahead of anybody
            self.flows.clear()

    def serve(self, item: Q) -> None:
        flow = self.flows[item.origin.caller]
        start = flow.start(item)
        self.now = max(self.now, start)
        flow.finish = start + item.num_rows
        self.remove(item)

    def head(self) -> Q:
        heads = ((flow, flow.oldest()) for flow in self.flows.values() if flow.kinds)
        return min(heads, key=lambda own: (own[0].start(own[1]), own[1].number))[1]

    def of_kind(self, kind: int) -> Iterator[Q]:
        """By start tags, as they are after what was served of those before."""
        lines = []
        for flow in self.flows.values():
            if own := flow.kinds.get(kind):
                items = islice(list(own.values()), _MOST_TOGETHER)
                first = next(items)
                lines.append((flow.start(first), first.number, first, items, flow))
        heapq.heapify(lines)
        while lines:
            _, _, item, items, flow = lines[0]
            yield item
            following = next(items, None)
            if following is None:
                heapq.heappop(lines)
            else:
                tag = flow.start(following)
                heapq.heapreplace(lines, (tag, following.number, following, items, flow))

    def forget_the_idle(self) -> None:
        """Callers without work whose share has come round."""
        for caller, flow in list(self.flows.items()):
            if not flow.kinds and flow.finish <= self.now:
                del self.flows[caller]

    def rows_before(self, caller: str, num_rows: int) -> int:
        """Rows served before those that the caller would add now."""
        own = self.flows.get(caller)
        start = self.now if own is None else max(self.now, own.finish) + own.num_rows
        found = 0 if own is None else own.num_rows
        for flow in self.flows.values():
            if flow is not own:
                lead = start + num_rows - max(self.now, flow.finish)
                found += min(flow.num_rows, max(0, int(lead)))
        return found


class FairQueue(Generic[Q]):
    """The works that wait.

    Args:
        ageing_s: batch work gets a turn before interactive work if it has had none for so long.
    """

    def __init__(self, ageing_s: float) -> None:
        self.ageing_s = ageing_s
        self.num_rows = 0
        self.num_bytes = 0
        self._rows_of: dict[int, int] = {}
        self._lanes: dict[Priority, _Lane[Q]] = {own: _Lane() for own in Priority}
        self._count = 0

    def __bool__(self) -> bool:
        return bool(self._rows_of)

    @property
    def num_callers(self) -> int:
        """Who wait, and who are ahead of their share; once for each priority."""
        interactive, batch = self._lanes.values()  # of every answer: a loop takes thrice as long
        return len(interactive.flows) + len(batch.flows)

    def oldest(self) -> Q | None:
        """Who has waited longest; None if nobody waits."""
        flows = (flow for lane in self._lanes.values() for flow in lane.flows.values())
        waiting = (flow.oldest() for flow in flows if flow.kinds)
        return min(waiting, key=lambda item: item.number, default=None)

    @property
    def kinds(self) -> int:
        """How many different ones wait."""
        return len(self._rows_of)

    def rows_of(self, kind: int) -> int:
        """Rows of a kind that wait."""
        return self._rows_of.get(kind, 0)

    def add(self, item: Q, now_s: float) -> None:
        """At the end of its caller's line."""
        self._count += 1
        item.number = self._count
        self._lanes[item.origin.priority].add(item, now_s)
        self.num_rows += item.num_rows
        self.num_bytes += item.num_bytes
        self._rows_of[item.kind] = self.rows_of(item.kind) + item.num_rows

    def remove(self, item: Q) -> None:
        """It leaves unserved; nothing happens if it does not wait any more."""
        if item.number:
            self._lanes[item.origin.priority].remove(item)
            self._forget(item)

    def serve(self, item: Q) -> None:
        """It leaves, and its caller is charged."""
        self._lanes[item.origin.priority].serve(item)
        self._forget(item)

    def _forget(self, item: Q) -> None:
        item.number = 0
        self.num_rows -= item.num_rows
        self.num_bytes -= item.num_bytes
        left = self._rows_of[item.kind] - item.num_rows
        if left:
            self._rows_of[item.kind] = left
        else:
            del self._rows_of[item.kind]

    def head(self, now_s: float) -> Q | None:
        """Whose turn it is."""
        lane = self._turn(now_s)
        return lane.head() if lane else None

    def turn(self, now_s: float) -> Iterator[Q]:
        """The head, then all others of its kind and priority, in the order of their turns. Each
        may be served or removed before the next one is asked for."""
        lane = self._turn(now_s)
        if lane is None:
            return
        lane.waits_since_s = now_s
        lane.forget_the_idle()
        head = lane.head()
        yield head
        for item in lane.of_kind(head.kind):
            if item is not head:
                yield item

    def _turn(self, now_s: float) -> _Lane[Q] | None:
        first, second = (self._lanes[own] for own in Priority)
        if second.is_empty():
            return None if first.is_empty() else first
        is_aged = now_s - second.waits_since_s >= self.ageing_s
        return second if is_aged or first.is_empty() else first

    def rows_before(self, origin: Origin, num_rows: int) -> int:
        """Rows that are served before those that the origin would add now, if no more come."""
        found = self._lanes[origin.priority].rows_before(origin.caller, num_rows)
        if origin.priority is Priority.BATCH:
            found += self._lanes[Priority.INTERACTIVE].num_rows
        return found

    def displaced(self, origin: Origin, num_rows: int, rows: int, num_bytes: int) -> list[Q] | None:
        """Works that must leave, newest first, so that `num_rows` rows of the origin get a place.

        Interactive work displaces batch work; within a priority the callers with the most rows
        lose theirs, as long as they keep more than the origin will have.

        Args:
            rows: to be freed.
            num_bytes: to be freed.

        Returns:
            None if there are not enough of them.
        """
        found: list[Q] = []
        for item in self._displaceable(origin, num_rows):
            if rows <= 0 and num_bytes <= 0:
                break
            found.append(item)
            rows -= item.num_rows
            num_bytes -= item.num_bytes
        return found if rows <= 0 and num_bytes <= 0 else None

    def _displaceable(self, origin: Origin, num_rows: int) -> Iterator[Q]:
        if origin.priority is Priority.INTERACTIVE:
            yield from _from_the_largest(self._lanes[Priority.BATCH], 0)
        lane = self._lanes[origin.priority]
        own = lane.flows.get(origin.caller)
        own_rows = own.num_rows if own else 0
        yield from _from_the_largest(lane, own_rows + num_rows)


def _from_the_largest(lane: _Lane[Q], least_rows: int) -> Iterator[Q]:
    """Newest works of whoever has the most rows, as long as that leaves `least_rows`."""
    heap = [
        (-flow.num_rows, name, flow.newest_first())
        for name, flow in lane.flows.items()
        if flow.num_rows > least_rows
    ]
    heapq.heapify(heap)
    while heap:
        negative_rows, name, items = heap[0]
        item = next(items, None)
        if item is None or negative_rows + item.num_rows > -least_rows:
            heapq.heappop(heap)
            continue
        yield item
        heapq.heapreplace(heap, (negative_rows + item.num_rows, name, items))
