"""`python -m chaos [DRILL ...] [--quick]`: break a mesh under load, print what callers saw.

Without names all drills run. Their results replace those of the same drills in
benchmarks/results/chaos.json, and so in docs/failures.md.
"""

import argparse
import asyncio
import os
import sys
import time
import traceback

from benchmarks.harness.report import table

from chaos import results
from chaos.drills import DRILLS
from chaos.mesh import kept
from chaos.watch import Drilled


def main() -> int:
    """Run what was asked for; the exit status says whether every bar holds."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="DRILL", help=f"of {', '.join(DRILLS)}")
    parser.add_argument("--quick", action="store_true", help="seconds each, and no bar on time")
    options = parser.parse_args()
    if unknown := set(options.names) - set(DRILLS):
        parser.error(f"no drill {', '.join(sorted(unknown))}; there are {', '.join(DRILLS)}")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # nothing here forks with gRPC open
    os.environ["HF_HUB_OFFLINE"] = "1"
    return asyncio.run(_run(options.names or list(DRILLS), quick=options.quick))


async def _run(names: list[str], *, quick: bool) -> int:
    holds = True
    async with kept() as own:
        for name in names:
            started_s = time.monotonic()
            try:
                drilled = await DRILLS[name](own, quick)
            except Exception:  # the others are worth running all the same
                print(f"## {name}\n\n{traceback.format_exc()}", flush=True)
                holds = False
                continue
            _print(f"{name} ({time.monotonic() - started_s:.0f} s)", drilled)
            if not quick:
                results.keep(name, drilled)
            holds = holds and all(bar.holds for bar in drilled.bars)
    return 0 if holds else 1


def _print(name: str, drilled: Drilled) -> None:
    parts = [f"## {name}", *drilled.notes]
    if drilled.rows:
        parts.append(table(drilled.rows))
    if drilled.bars:
        parts.append(table([bar.as_row() for bar in drilled.bars]))
    if drilled.worst:
        parts.append(table(drilled.worst))
    print("\n\n".join(parts) + "\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
