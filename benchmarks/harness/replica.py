"""One expert replica in a process of its own, without Ray: `python -m benchmarks.harness.replica`.

The same `Replica` that Serve runs; its settings come as JSON on the command line, with three of
their own: `replica` is its name, `slowdown` how many times it computes everything, `row_delay_s`
how much longer each row takes, without using the CPU. Ends on SIGTERM.
"""

import asyncio
import json
import signal
import sys
import time

import torch
import uvloop

from expertmesh.experts.batch import PackedRows
from expertmesh.experts.cost_fit import CostFit
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.experts.replica import Replica


async def _main(args: ExpertGroupArgs, name: str, slowdown: int, row_delay_s: float) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    replica = await Replica.start(args, name)
    if slowdown > 1:
        _slow_down(replica, slowdown)
    if row_delay_s:
        _delay(replica, row_delay_s)
        replica._batcher.stats.fit = CostFit()
        await replica._trials.rehearse()
    print("ready", flush=True)
    await stop.wait()
    await replica.drain_and_stop()


def _slow_down(replica: Replica, times: int) -> None:
    """As on a slower device: everything is computed so many times."""
    batcher = replica._batcher
    compute = batcher._compute

    def slowly(rows: PackedRows) -> torch.Tensor:
        for _ in range(times - 1):
            compute(rows)
        return compute(rows)

    batcher._compute = slowly


def _delay(replica: Replica, row_delay_s: float) -> None:
    """As on an accelerator that is busy while this host's CPU is not."""
    batcher = replica._batcher
    compute = batcher._compute

    def slowly(rows: PackedRows) -> torch.Tensor:
        time.sleep(row_delay_s * rows.num_rows)
        return compute(rows)

    batcher._compute = slowly


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    own = fields.pop("replica", f"{fields['group']}#1")
    times = fields.pop("slowdown", 1)
    row_delay_s = fields.pop("row_delay_s", 0.0)
    uvloop.run(_main(ExpertGroupArgs(**fields), own, times, row_delay_s))
