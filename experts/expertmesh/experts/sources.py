"""Where weights come from when they are not on the device: host memory, else the checkpoint.

Each source's `fill` is a `Fill` (loads.py) and runs on the loader's thread only.
"""

import time

import torch

from expertmesh.experts.arena import Arena
from expertmesh.experts.loads import Cancelled, Fill, IsCancelled
from expertmesh.experts.reader import ExpertReader
from expertmesh.experts.residency import ExpertKey, Residency
from expertmesh.experts.stack import ExpertStack

_SLICE_S = 0.001


class CheckpointSource:
    """The mapped checkpoint: read, dequantised and cast anew for each load.

    Args:
        dtype: to dequantise to.
    """

    def __init__(self, reader: ExpertReader, dtype: torch.dtype) -> None:
        self._reader, self._dtype = reader, dtype

    def fill(self, key: ExpertKey, stack: ExpertStack, is_cancelled: IsCancelled) -> None:
        """Copies tensor by tensor.

        Raises:
            DamagedShard: a file has been cut off.
            Cancelled: the weights are not needed any more.
        """
        self._reader.check_still_there(*key)
        for target, values in stack.pairs(0, self._reader.load(*key, self._dtype)):
            if is_cancelled():
                raise Cancelled
            target.copy_(values)


class HostCopies:
    """Weights in host memory, ready for the device, under a budget of their own.

    What is asked for is kept while there is room, then only in place of what is asked for less.

    Args:
        residency: of the host's memory.
        arena: its slots, laid out as the device's.
        fill: where weights come from that are not here.
    """

    def __init__(self, residency: Residency, arena: Arena, fill: Fill) -> None:
        self._residency, self._arena, self._below = residency, arena, fill
        self._num_uses = 0
        self._copies: dict[ExpertKey, ExpertStack] = {}

    def fill(self, key: ExpertKey, stack: ExpertStack, is_cancelled: IsCancelled) -> None:
        """One copy of flat memory if the weights are here; what `fill` of the source below raises
        if not."""
        self._num_uses += 1
        self._residency.use(key, self._num_uses)
        if key not in self._copies and not self._keep(key, is_cancelled):
            self._below(key, stack, is_cancelled)
            return
        if is_cancelled():
            raise Cancelled
        stack.memory.copy_(self._copies[key].memory, non_blocking=True)

    def _keep(self, key: ExpertKey, is_cancelled: IsCancelled) -> bool:
        """Whether there was room for a copy, which now is there."""
        now = self._num_uses
        own = self._residency.popularity(key, now)
        dearer = {k for k in self._copies if self._residency.popularity(k, now) >= own}
        evicted = self._residency.start_load(key, dearer)
        if evicted is None:
            return False
        for victim in evicted:
            self._arena.give_back(self._copies.pop(victim))
        copy = self._arena.take(key)
        try:
            self._below(key, copy, is_cancelled)
        except BaseException:
            self._residency.not_loaded(key)
            self._arena.give_back(copy)
            raise
        self._copies[key] = copy
        self._residency.loaded(key)
        return True


class Slowed:
    """Stands for the PCIe link to a GPU where there is none: copying memory on a CPU takes next to
    no time, so without it a benchmark of misses would measure nothing.

    Args:
        fill: what is slowed down.
        bytes_per_s: at most.
    """

    def __init__(self, fill: Fill, bytes_per_s: float) -> None:
        self._below, self._bytes_per_s = fill, bytes_per_s

    def fill(self, key: ExpertKey, stack: ExpertStack, is_cancelled: IsCancelled) -> None:
        """Takes as long as the link would; what the `fill` below raises."""
        end_s = time.monotonic() + stack.memory.nbytes / self._bytes_per_s
        self._below(key, stack, is_cancelled)
        while (left_s := end_s - time.monotonic()) > 0:
            if is_cancelled():
                raise Cancelled
            time.sleep(min(left_s, _SLICE_S))
