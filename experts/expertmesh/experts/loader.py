"""Brings experts' weights to the device on a thread of its own, while others compute.

One lock guards the accounting (`residency.py`), the slots (`arena.py`) and the orders. A slot gets
its values outside the lock, while nobody else can reach it, and is handed out only when it is full.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from expertmesh.experts.arena import Arena
from expertmesh.experts.loads import Cancelled, Fill, LoadCounts, unavailable
from expertmesh.experts.residency import ExpertKey, Residency
from expertmesh.experts.sizing import check_holds_one
from expertmesh.experts.stack import ExpertStack
from expertmesh.runtime.errors import Draining, WeightsUnavailable

logger = logging.getLogger(__name__)

_MAX_HOPES = 4


class ExpertLoader:
    """Start with `start`, end with `close`. Methods may be called from any thread.

    Args:
        fill: runs on the loader's thread.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        residency: Residency,
        arena: Arena,
        fill: Fill,
        device: torch.device,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._residency, self._arena, self._fill = residency, arena, fill
        self._device, self._clock = device, clock
        self._first_budget_bytes = residency.budget_bytes
        self._stacks: dict[ExpertKey, ExpertStack] = {}
        self._wanted: deque[ExpertKey] = deque()
        self._hopes: deque[Sequence[ExpertKey]] = deque(maxlen=_MAX_HOPES)
        """What is expected after the last few batches, the newest first."""
        self._likely: deque[ExpertKey] = deque()
        """What of it is still to be tried before the next batch."""
        self._asked: frozenset[ExpertKey] = frozenset()
        """What is computed now or next: a prefetch must not take it away."""
        self._guess: ExpertKey | None = None
        """The prefetch being loaded; None once it is cancelled."""
        self._is_stuck = False
        """Whether the loader waits for somebody to unpin something."""
        self._failed: dict[ExpertKey, WeightsUnavailable] = {}
        self._closed = False
        self._num_uses = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="expertmesh-loader", daemon=True)
        self.counts = LoadCounts()

    def start(self) -> None:
        """Start the loader's thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread. Who waits for weights gets Draining."""
        with self._changed:
            self._closed = True
            self._guess = None
            self._changed.notify_all()
        self._thread.join()

    def are_resident(self, keys: Sequence[ExpertKey]) -> bool:
        """Whether all are on the device now; if so, no prefetch takes them away before a `use`."""
        with self._changed:
            if not self._residency.resident.issuperset(keys):
                return False
            self._asked = frozenset(keys)
            return True

    @contextmanager
    def locked(self) -> Iterator[Residency]:
        """The accounting, while nothing changes it."""
        with self._changed:
            yield self._residency

    def use(
        self, keys: Sequence[ExpertKey], then: Sequence[ExpertKey] = ()
    ) -> Generator[dict[ExpertKey, ExpertStack], None, None]:
        """The weights of each expert once, in as few portions as they get there.

        A portion stays on the device until the next one is asked for. Everything missing is
        ordered at once, so the rest is loaded while a portion is in use.

        Args:
            keys: distinct.
            then: experts probably needed next: loaded when nothing else is to be.

        Raises:
            WeightsUnavailable: some could not be loaded.
            Draining: the loader was closed.
        """
        remaining = set(keys)
        self._order(keys, then)
        try:
            while remaining:
                ready = self._wait_for_any(remaining)
                yield ready
                self._unpin(ready)
                remaining -= ready.keys()
        finally:
            if remaining:
                self._unpin(remaining)

    def set_budget(self, budget_bytes: int | None) -> None:
        """Change the device's budget while experts are used; None is the one from the start.

        Raises:
            ConfigError: it does not hold the largest expert; nothing has changed.
        """
        with self._changed:
            wanted_bytes = budget_bytes or self._first_budget_bytes
            check_holds_one("device_memory_bytes", wanted_bytes, self._residency.largest_bytes)
            self._make_room(self._residency.set_budget(wanted_bytes, self._asked))
            self._arena.set_budget(wanted_bytes)
            self._changed.notify_all()

    def _order(self, keys: Sequence[ExpertKey], then: Sequence[ExpertKey]) -> None:
        with self._changed:
            self._num_uses += len(keys)
            self._asked = frozenset(keys)
            missing = [key for key in keys if not self._residency.use(key, self._num_uses)]
            for key in keys:
                self._residency.pin(key)
            self.counts.hits += len(keys) - len(missing)
            self.counts.misses += len(missing)
            for key in missing:
                self._failed.pop(key, None)
                self._wanted.append(key)
            self._expect(keys, then)
            if self._guess and self._is_wrong(self._guess, keys, bool(missing)):
                self._guess = None
            if missing or self._likely:  # waking a thread costs more than a hit
                self._changed.notify_all()

    def _expect(self, keys: Sequence[ExpertKey], then: Sequence[ExpertKey]) -> None:
        """Hopes for the layers asked for now have come true or not; callers may alternate, so those
        for other layers stay."""
        layers = {key.layer for key in keys}
        left = [hope for hope in self._hopes if hope[0].layer not in layers]
        self._hopes.clear()
        self._hopes.extend([then, *left] if then else left)
        self._likely = deque(k for hope in self._hopes for k in hope if not self._is_here(k))

    def _is_wrong(self, guess: ExpertKey, keys: Sequence[ExpertKey], is_waiting: bool) -> bool:
        """What loads for nobody goes on only if it may still be right and delays nobody."""
        return guess not in keys and (is_waiting or guess.layer in {key.layer for key in keys})

    def _unpin(self, keys: "set[ExpertKey] | dict[ExpertKey, ExpertStack]") -> None:
        with self._changed:
            for key in keys:
                self._residency.unpin(key)
            if self._is_stuck:
                self._changed.notify_all()

    def _wait_for_any(self, keys: set[ExpertKey]) -> dict[ExpertKey, ExpertStack]:
        with self._changed:
            while True:
                for key in self._failed.keys() & keys:
                    raise self._failed[key]
                if ready := {key: self._stacks[key] for key in keys & self._residency.resident}:
                    return ready
                if self._closed:
                    raise Draining("the replica has stopped")
                self._changed.wait()

    def _run(self) -> None:
        with self._side_stream():
            while key := self._next():
                self._load(key)

    def _side_stream(self) -> AbstractContextManager[object]:
        """On a GPU copies overlap kernels only in a stream of their own."""
        if self._device.type != "cuda":
            return nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    def _next(self) -> ExpertKey | None:
        """Wait for the next expert to load, and make room for it; None at the end."""
        with self._changed:
            while not self._closed:
                if key := self._startable():
                    return key
                self._changed.wait()
            return None

    def _startable(self) -> ExpertKey | None:
        """The next expert to load that there is room for."""
        self._is_stuck = False
        while self._wanted:
            key = self._wanted[0]
            if self._is_here(key) or key not in self._residency.pinned:
                self._wanted.popleft()
            elif self._make_room(self._residency.start_load(key)):
                return self._wanted.popleft()
            else:
                self._is_stuck = True
                return None
        keep = self._asked.union(*self._hopes)
        while self._likely:
            key = self._likely.popleft()
            if not self._is_here(key) and self._make_room(self._residency.start_load(key, keep)):
                self._guess = key
                self.counts.prefetches += 1
                return key
        return None

    def _is_here(self, key: ExpertKey) -> bool:
        return key in self._residency.resident or key in self._residency.loading

    def _make_room(self, evicted: list[ExpertKey] | None) -> bool:
        for victim in evicted or ():
            self._arena.give_back(self._stacks.pop(victim))
            self.counts.evictions += 1
        return evicted is not None

    def _load(self, key: ExpertKey) -> None:
        started_s = self._clock()
        stack: ExpertStack | None = None
        error: Exception | None = None
        try:
            stack = self._slot_for(key)
            self._fill(key, stack, self._cancellation(key))
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        except Exception as caught:
            error = caught
        with self._changed:
            self._guess = None
            if stack and not error:
                self._stacks[key] = stack
                self._residency.loaded(key)
                self._failed.pop(key, None)
                self.counts.observe_load(self._clock() - started_s)
            else:
                self._give_up(key, stack, error)
            self._changed.notify_all()

    def _cancellation(self, key: ExpertKey) -> Callable[[], bool]:
        """Whether nobody wants the expert any more; of one that was not a guess only at the end."""
        if self._guess != key:
            return lambda: self._closed
        return lambda: self._closed or (self._guess is None and key not in self._asked)

    def _slot_for(self, key: ExpertKey) -> ExpertStack:
        """A slot; where the device has less memory than the budget says, others leave for it."""
        with self._changed:
            while True:
                try:
                    return self._arena.take(key)
                except RuntimeError:
                    if not self._residency.resident or self._closed:
                        raise
                is_guess = self._guess == key
                if victim := self._residency.evict_one(self._asked if is_guess else ()):
                    self._make_room([victim])
                elif is_guess:
                    raise Cancelled
                else:
                    self._is_stuck = True
                    self._changed.wait()

    def _give_up(self, key: ExpertKey, stack: ExpertStack | None, error: Exception | None) -> None:
        self._residency.not_loaded(key)
        if stack:
            self._arena.give_back(stack)
        if isinstance(error, Cancelled):
            self.counts.cancelled += 1
        elif error:
            self.counts.failed += 1
            self._failed[key] = unavailable(key, error)
            logger.error("layer %d, expert %d was not loaded", *key, exc_info=error)
