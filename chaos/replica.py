"""The replica that Serve runs, with troubles of its own: a slow device, a garbled answer.

Runs in a process forked by `chaos.nursery`.
"""

import asyncio
import os
import select
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from chaos.garbage import Garbler, Reply
from expertmesh.experts import servicer
from expertmesh.experts.batch import Computed, PackedRows
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.experts.replica import Replica
from expertmesh.experts.servicer import ExpertServicer
from expertmesh.runtime import wire
from expertmesh.v1 import control_pb2, expert_pb2

SLOW_TIMES = 10
NOT_AT_ONCE = {"at_once_s": 0}


@dataclass(frozen=True)
class Troubles:
    """What is wrong with a replica."""

    announce: str = ""
    """Address it announces, of a `Link` to it; "" is its own."""
    device_s: float = 0.0
    """Time that a batch takes on the device beside its compute: a wait, as for a GPU, which costs
    no CPU. SIGUSR1 makes it `SLOW_TIMES` longer, SIGUSR2 puts an end to that."""
    garbage: str = ""
    """Kind of a garbled answer, see `chaos.garbage`; "" is none."""
    garbage_frac: float = 0.2
    """Share of the answers that are garbled."""
    tally: str = ""
    """File that gets a byte for each garbled answer."""


def troubled(troubles: Troubles) -> type[Replica]:
    """A replica class with these troubles; with none it is the one that Serve runs."""

    class Troubled(Replica):
        def state(self) -> control_pb2.ReplicaState:
            state = super().state()
            if troubles.announce:
                state.address, state.local_socket = troubles.announce, ""
            return state

    return Troubled


async def run_replica(
    args: ExpertGroupArgs, name: str, troubles: Troubles, on_ready: Callable[[], None]
) -> None:
    """Serve until SIGTERM, then drain."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    if troubles.garbage:
        tally = os.open(troubles.tally, os.O_WRONLY | os.O_APPEND)
        count = partial(os.write, tally, b".")
        _garble(Garbler(troubles.garbage, troubles.garbage_frac, count))
    replica = await troubled(troubles).start(args, name)
    if troubles.device_s:
        _add_device(replica, troubles.device_s, loop)
    on_ready()
    await stop.wait()
    await replica.drain_and_stop()


def _add_device(replica: Replica, device_s: float, loop: asyncio.AbstractEventLoop) -> None:
    """Let every batch wait, in the compute thread."""
    batcher = replica._batcher
    compute, times = batcher._compute, 1

    def slowly(rows: PackedRows) -> torch.Tensor:
        select.select((), (), (), device_s * times)  # libfaketime breaks Python's time.sleep
        return compute(rows)

    def take_longer(factor: int) -> None:
        nonlocal times
        times = factor

    batcher._compute = slowly
    replica.set_live(NOT_AT_ONCE)  # else few rows would hold up the event loop
    loop.add_signal_handler(signal.SIGUSR1, take_longer, SLOW_TIMES)
    loop.add_signal_handler(signal.SIGUSR2, take_longer, 1)


def _garble(garbler: Garbler) -> None:
    """Every answer of this process that goes over gRPC."""
    make: Any = ExpertServicer._reply

    def reply(self: ExpertServicer, header: expert_pb2.ComputeRequest, done: Computed) -> Reply:
        return garbler.reply(*make(self, header, done))

    def encode(*parts: Any) -> bytes:
        return garbler.message(wire.encode(*parts))

    ExpertServicer._reply = reply  # type: ignore[method-assign]
    garbled = SimpleNamespace(encode=encode, decode=wire.decode)
    vars(servicer)["wire"] = garbled
