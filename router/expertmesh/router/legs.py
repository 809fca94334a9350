"""A leg: one message of a call, on its way to one replica; and the legs that stand in for it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from expertmesh.router.calls import RowForm
from expertmesh.router.plan import Shipment
from expertmesh.router.rows import CallRows
from expertmesh.router.shipping import GroupShares, Shipper
from expertmesh.router.snapshot import Replica
from expertmesh.router.streams import Answer, ReplicaStream
from expertmesh.runtime.errors import CorruptAnswer, ExpertMeshError
from expertmesh.runtime.origin import Origin
from expertmesh.v1 import expert_pb2


@dataclass(eq=False, slots=True)
class Batch:
    """Shipments that were planned together, and their rows."""

    rows: CallRows
    origin: Origin
    is_recorded: bool
    """Whether its legs have spans."""
    filed: list[int] = field(default_factory=list)
    """Indices of the shipments whose answers have come."""


@dataclass(eq=False, slots=True)
class Leg:
    """One message to one replica. Its rows are there when it is answered, or all of its stand-ins
    are, whichever comes first."""

    shipment: Shipment
    replica: Replica
    batch: Batch
    index: int
    """Of the shipment in the batch."""
    parent: "Leg | None"
    """The leg it stands in for."""
    is_hedge: bool
    """Whether the parent was only late when this was sent."""
    num_rows: int
    """Rows it carries."""
    children: list["Leg"] = field(default_factory=list)
    """Stand-ins that are under way or done."""
    is_done: bool = False
    is_waiting: bool = False
    """Whether its own answer may still come."""
    due_s: float = 0.0
    """When it is late."""
    stream: ReplicaStream | None = None
    number: int = 0
    started_s: float = 0.0
    shares: GroupShares | None = None
    """Set when it is sent."""
    span: Span | None = None

    def send(
        self,
        shipper: Shipper,
        request: expert_pb2.ComputeRequest,
        timeout_s: float,
        on_answer: Callable[["Leg", Answer | ExpertMeshError], None],
        copies: Sequence[Replica],
    ) -> None:
        """Put it on its way.

        Args:
            copies: who could have been asked: by whose times it will be late.

        Raises:
            StreamClosed, MessageTooLarge, QueueFull: nothing was sent.
        """
        replica, batch, num_rows = self.replica, self.batch, self.num_rows
        stream = self.stream = shipper.stream(replica)
        rows = batch.rows.take(self.index)
        started_s = self.started_s = shipper.clock()
        if batch.is_recorded:
            self.span = self._span(shipper, request)
        try:
            self.number = stream.send(request, rows, num_rows, timeout_s, partial(on_answer, self))
        except ExpertMeshError as error:
            self._end_span(error)
            raise
        self.is_waiting = True
        shipper.backlog.add(replica.life, batch.origin, num_rows)
        self.due_s = started_s + shipper.late_s(replica, num_rows, copies)
        self.shares = shipper.shares(replica.state.group)
        self.shares.in_flight_rows.value += num_rows

    def _span(self, shipper: Shipper, request: expert_pb2.ComputeRequest) -> Span:
        """A running span that the replica's spans are children of."""
        span, request.traceparent = shipper.telemetry.start("router.send", kind=SpanKind.CLIENT)
        span.set_attribute("expertmesh.replica", self.replica.name)
        span.set_attribute("expertmesh.rows", self.num_rows)
        span.set_attribute("expertmesh.stands_in", self.parent is not None)
        return span

    def landed(self, shipper: Shipper, error: ExpertMeshError | None = None) -> None:
        """Its own answer is there, or will not come or be waited for."""
        assert self.shares
        self.is_waiting = False
        shipper.backlog.remove(self.replica.life, self.batch.origin, self.num_rows)
        self.shares.in_flight_rows.value -= self.num_rows
        if self.span is not None:
            self._end_span(error)

    def _end_span(self, error: BaseException | None) -> None:
        if self.span is None:
            return
        if error:
            self.span.record_exception(error)
            self.span.set_status(Status(StatusCode.ERROR, str(error)))
        self.span.end()
        self.span = None

    def observe(self, shipper: Shipper, response: expert_pb2.ComputeResponse) -> None:
        """Account the times of its answer."""
        assert self.stream
        assert self.shares
        now_s = shipper.clock()
        took_s = now_s - self.started_s
        transport_s = took_s - (response.queue_us + response.compute_us) / 1e6
        self.stream.observe_transport(transport_s * 1e6, now_s)
        shipper.latencies.observe(self.num_rows, took_s)
        self.shares.transport_time.add(transport_s)
        self.shares.rows.value += self.num_rows

    def file(self, answer: Answer, form: RowForm) -> None:
        """Put the rows in their place.

        Raises:
            CorruptAnswer: it is of another form than asked for, which is never a number.
        """
        response, payload = answer
        got = (response.dtype, response.hidden_size, len(payload))
        asked = (form.dtype, form.hidden_size, self.num_rows * form.row_bytes)
        if got != asked:
            raise CorruptAnswer(
                f"{self.replica.name} answered (dtype, width, bytes) {got}, asked for {asked}"
            )
        self.batch.rows.put(self.index, payload)
        self.batch.filed.append(self.index)

    def outrun(self, shipper: Shipper) -> None:
        """Its stand-ins were faster: for a while nobody should wait for that replica."""
        assert self.stream
        now_s = shipper.clock()
        self.stream.observe_outrun((now_s - self.started_s) * 1e6, now_s)

    def abandon(self, shipper: Shipper) -> None:
        """Nobody waits for it or its stand-ins any more."""
        if self.is_waiting:
            assert self.stream
            self.stream.cancel(self.number)
            self.landed(shipper)
        for child in self.children:
            child.abandon(shipper)

    def all(self) -> Iterator["Leg"]:
        """It, its stand-ins, theirs, and so on."""
        yield self
        for child in self.children:
            yield from child.all()

    def asked(self) -> set[str]:
        """Replicas that have been asked for its rows: its own and those it stands in for."""
        return {self.replica.name} | (self.parent.asked() if self.parent else set())
