"""One expert replica in a process of its own, without Ray: `python -m benchmarks.harness.replica`.

The same `Replica` that Serve runs; its settings come as JSON on the command line. Ends on SIGTERM.
"""

import asyncio
import json
import signal
import sys

import uvloop

from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.experts.replica import Replica


async def _main(args: ExpertGroupArgs, name: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    replica = await Replica.start(args, name)
    print("ready", flush=True)
    await stop.wait()
    await replica.drain_and_stop()


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    uvloop.run(_main(ExpertGroupArgs(**fields), name=f"{fields['group']}#1"))
