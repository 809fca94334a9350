"""Experts a replica takes on and gives up while it serves, beside those of its configuration.

A guest's layer gets a new stack with it (or without it), filled from the old one and the
checkpoint, and put in the old one's place when it is complete: batches under way keep what they
began with, and a row gets the bits it would get had the replica started with these experts. That
takes the memory of one layer's experts for a moment.

Experts of the configuration never leave, so a replica that starts again brings back everything that
only it held.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import torch

from expertmesh.experts.admission import Holding
from expertmesh.experts.ffn import ExpertFFN
from expertmesh.experts.loading import LoadedExperts
from expertmesh.experts.sizing import format_bytes
from expertmesh.runtime.errors import (
    DeadlineExceeded,
    InsufficientMemory,
    InvalidInput,
    UnknownExpert,
)

logger = logging.getLogger(__name__)

_POLL_S = 0.02
_PATIENCE = 5.0
"""A guest that is still asked for after so many times the quiet wanted stays."""

Key = tuple[int, int]
"""(layer, expert)"""
T = TypeVar("T", tuple[int, ...], frozenset[int])


class Guests:
    """Changes what a replica holds, one change at a time.

    Args:
        loaded: its `experts` are what heartbeats announce, its `layers` what computes.
        holding: what requests are checked against.
        budget_bytes: for guests' weights.
        free_bytes: what the device has free.
        try_out: computes a row through an expert of a layer, by the queue, so that all rows queued
            before are done when it returns; raises if the outcome is not finite.
        rows: computed so far, by expert.
        announce: tells routers at once what is held now.
        is_heard: whether Redis took the newest heartbeat.
    """

    def __init__(
        self,
        loaded: LoadedExperts,
        holding: Holding,
        budget_bytes: int,
        free_bytes: Callable[[], int],
        try_out: Callable[[int, int], Awaitable[None]],
        rows: Counter[Key],
        announce: Callable[[], None],
        is_heard: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loaded, self._holding = loaded, holding
        self._budget_bytes, self._free_bytes = budget_bytes, free_bytes
        self._try_out, self._rows = try_out, rows
        self._announce, self._is_heard = announce, is_heard
        self._clock = clock
        self._own = {layer: frozenset(held) for layer, held in loaded.experts.items()}
        self._changing = asyncio.Lock()
        self.version = 0
        """Grows with every change of what is announced."""

    def of(self, layer: int) -> tuple[int, ...]:
        """Guests of a layer, ascending."""
        own = self._own.get(layer, frozenset())
        return tuple(e for e in self._loaded.experts.get(layer, ()) if e not in own)

    @property
    def used_bytes(self) -> int:
        """Of the budget."""
        sizes = self._loaded.expert_bytes
        return sum(sizes[layer] * len(self.of(layer)) for layer in self._loaded.experts)

    @property
    def free_bytes(self) -> int:
        """Left of the budget; none if the replica swaps experts in and out."""
        return 0 if self._loaded.loader else self._budget_bytes - self.used_bytes

    async def add(self, layer: int, expert: int) -> None:
        """Load an expert, try it, admit rows for it, announce it. Nothing happens if it is held.

        Raises:
            UnknownExpert: the model has no such expert.
            InsufficientMemory: the budget, or what the device has free, does not hold it.
            InternalError: it gives no finite output; it is given up again.
        """
        async with self._changing:
            announced = self._loaded.experts.get(layer, ())
            if expert in announced:
                return
            self._check_room(layer, expert)
            before = self._loaded.layers.get(layer)
            new = await asyncio.to_thread(self._rebuilt, layer, {*announced, expert})
            self._loaded.layers[layer] = new
            try:
                await self._try_out(layer, expert)
            except BaseException:
                if before is None:
                    del self._loaded.layers[layer]
                else:
                    self._loaded.layers[layer] = before
                raise
            self._admit(layer, frozenset({*announced, expert}))
            self._tell(layer, {*announced, expert})
            logger.info("layer %d, expert %d: taken on as a guest", layer, expert)

    async def drop(self, layer: int, expert: int, linger_s: float) -> None:
        """Announce that a guest leaves, serve it until nobody has asked for it for `linger_s` and
        routers can have heard of it, then free it. Nothing happens if it is not held.

        Raises:
            InvalidInput: it is no guest.
            DeadlineExceeded: it is asked for all the time; it stays.
        """
        async with self._changing:
            announced = self._loaded.experts.get(layer, ())
            if expert not in announced:
                return
            if expert not in self.of(layer):
                raise InvalidInput.of(
                    "expert",
                    expected=f"a guest of layer {layer}: {list(self.of(layer))}",
                    got=f"{expert}, which is of the replica's configuration",
                )
            left = frozenset(announced) - {expert}
            self._tell(layer, left)
            try:
                await self._quiet(layer, expert, linger_s)
            except BaseException:
                self._tell(layer, announced)
                raise
            self._admit(layer, left)
            await self._try_out(layer, expert)  # rows admitted before are done after it
            if left:
                new = await asyncio.to_thread(self._rebuilt, layer, left)
                self._loaded.layers[layer] = new
            else:
                del self._loaded.layers[layer]
            logger.info("layer %d, expert %d: given up", layer, expert)

    def _check_room(self, layer: int, expert: int) -> None:
        reader = self._loaded.reader
        if layer not in reader.layers() or not 0 <= expert < reader.num_experts(layer):
            raise UnknownExpert(
                f"layer {layer}, expert {expert}: the model has no such expert",
                layer=layer,
                expert=expert,
            )
        if self._loaded.loader:
            raise InsufficientMemory(
                f"layer {layer}, expert {expert}: a replica whose device does not hold its own "
                "experts takes no guests",
                layer=layer,
                expert=expert,
            )
        needed_bytes = self._loaded.expert_bytes[layer]
        num_held = len(self._holding.experts_by_layer.get(layer, ()))
        for what, needed, free in (
            ("experts.guest_memory_bytes has", needed_bytes, self.free_bytes),
            ("the device has", needed_bytes * (num_held + 1), self._free_bytes()),
        ):
            if needed > free:
                raise InsufficientMemory(
                    f"layer {layer}, expert {expert}: taking it on needs {format_bytes(needed)}, "
                    f"{what} {format_bytes(free)} left",
                    layer=layer,
                    expert=expert,
                    needed_bytes=needed,
                    free_bytes=free,
                )

    def _rebuilt(self, layer: int, experts: Iterable[int]) -> ExpertFFN:
        """A new stack of these experts of a layer. Runs in a thread."""
        torch.get_num_threads()  # sets it for this thread: copies must not take all cores
        loaded, old = self._loaded, self._loaded.layers.get(layer)
        reader, dtype = loaded.reader, loaded.dtype
        offsets, shape = reader.memory_offsets(layer, dtype), reader.expert_shape(layer)
        new = ExpertFFN(reader.spec, shape, sorted(experts), dtype, loaded.device, offsets)
        for own in new.experts:
            if isinstance(old, ExpertFFN) and own in old.experts:
                new.fill(own, old.tensors(own))
            else:
                reader.check_still_there(layer, own)
                new.fill(own, reader.load(layer, own, dtype))
        return new

    async def _quiet(self, layer: int, expert: int, linger_s: float) -> None:
        """Until no rows have come for so long since routers can have heard of it."""
        rows, began_s = self._rows[layer, expert], self._clock()
        since_s = began_s
        while (now_s := self._clock()) - since_s < linger_s:
            if now_s - began_s > _PATIENCE * linger_s:
                raise DeadlineExceeded(
                    f"layer {layer}, expert {expert}: still asked for after {now_s - began_s:.1f} "
                    "s; it stays",
                    layer=layer,
                    expert=expert,
                )
            await asyncio.sleep(min(_POLL_S, linger_s))
            if self._rows[layer, expert] != rows or not self._is_heard():
                rows, since_s = self._rows[layer, expert], self._clock()

    def _admit(self, layer: int, experts: frozenset[int]) -> None:
        _set_or_remove(self._holding.experts_by_layer, layer, experts)

    def _tell(self, layer: int, experts: Iterable[int]) -> None:
        _set_or_remove(self._loaded.experts, layer, tuple(sorted(experts)))
        self.version += 1
        self._announce()


def _set_or_remove(found: dict[int, T], layer: int, experts: T) -> None:
    if experts:
        found[layer] = experts
    else:
        found.pop(layer, None)
