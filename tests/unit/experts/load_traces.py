"""Made-up loads of an expert group: its samples, and what the rule makes of them."""

from collections.abc import Callable, Iterable

from expertmesh.experts.load_history import GroupSample, LoadHistory
from expertmesh.experts.scaling import Decision, decide
from expertmesh.experts.scaling_options import ScalingOptions

STEP_S = 0.5
ROW_S = 0.001


def sample(at_s: float, load: float, ready: int = 1, **changes: float) -> GroupSample:
    """Of a group that keeps up with `load` replicas' worth of rows."""
    rows_per_s = load / ROW_S
    fields = {
        "busy": load,
        "arrival_rows_per_s": rows_per_s,
        "done_rows_per_s": rows_per_s,
        "row_s": ROW_S,
        **changes,
    }
    return GroupSample(at_s, ready, **fields)  # type: ignore[arg-type]


def history(
    loads: Iterable[float], ready: int = 1, span_s: float = 2.0, **changes: float
) -> LoadHistory:
    """A sample each `STEP_S`, all with `changes`."""
    samples = (sample(n * STEP_S, load, ready, **changes) for n, load in enumerate(loads))
    return LoadHistory(span_s, 3600.0, samples)


def decision(past: LoadHistory, options: ScalingOptions, **more: object) -> Decision:
    """The decision right after the newest sample."""
    return decide(past, options, now_s=past.newest.at_s, **more)  # type: ignore[arg-type]


class Group:
    """A group whose replicas get ready some time after they are wanted.

    Rows that find all replicas busy wait; who waits is worked off when there is time.
    """

    def __init__(self, options: ScalingOptions, ready: int = 1, start_s: float = 0.0) -> None:
        self.options = options
        self.ready = ready
        self.start_s = start_s
        self.wanted: list[int] = []
        self.reasons: list[str] = []
        self.waiting = 0.0
        """Replica-seconds of work."""
        self._now_s = 0.0
        self._history = LoadHistory.of(options)
        self._coming: list[float] = []

    def run(self, seconds: float, load: Callable[[float], float]) -> None:
        """`load` of seconds since this run began is the replicas' worth of work that comes."""
        for step in range(round(seconds / STEP_S)):
            self._step(load(step * STEP_S))

    def _step(self, load: float) -> None:
        self._now_s += STEP_S
        self.ready += sum(at_s <= self._now_s for at_s in self._coming)
        self._coming = [at_s for at_s in self._coming if at_s > self._now_s]
        busy = min(self.ready, load + self.waiting / STEP_S)
        self.waiting = max(0.0, self.waiting + (load - busy) * STEP_S)
        self._history.add(self._sample(load, busy))
        made = decide(self._history, self.options, now_s=self._now_s)
        self.wanted.append(made.wanted)
        self.reasons.append(made.reason)
        self._follow(made.wanted)

    def _sample(self, load: float, busy: float) -> GroupSample:
        return GroupSample(
            self._now_s,
            self.ready,
            busy,
            load / ROW_S,
            busy / ROW_S,
            queued_rows=self.waiting / ROW_S,
            queue_delay_s=self.waiting / max(1, self.ready),
            row_s=ROW_S,
            starting=len(self._coming),
        )

    def _follow(self, wanted: int) -> None:
        present = self.ready + len(self._coming)
        if wanted > present:
            self._coming += [self._now_s + self.start_s] * (wanted - present)
        elif wanted < present:
            fewer = present - wanted
            self.ready -= max(0, fewer - len(self._coming))
            self._coming = self._coming[: max(0, len(self._coming) - fewer)]
