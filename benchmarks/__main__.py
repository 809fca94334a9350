"""`python -m benchmarks [NAME ...] [--quick]`: run benchmarks, write results/, print the tables."""

import argparse
import importlib
import os
import sys

NAMES = (
    "hivemind",
    "ray_serve",
    "overhead",
    "dense",
    "balance",
    "churn",
    "moving",
    "throttled",
    "simulation",
    "day",
    "fidelity",
    "overload",
    "decision",
    "residency",
    "generation",
    "growth",
    "memory",
    "elastic",
    "startup",
    "telemetry",
    "tls",
    "flames",
)


def main() -> int:
    """Run what was asked for; the exit status says whether every bar holds, if not --quick."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="a short run that proves it works")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # contestants are started, not forked
    holds = True
    for name in options.names or NAMES:
        report = importlib.import_module(f"benchmarks.{name}").run(quick=options.quick)
        if not options.quick:
            report.write()
        print(report.markdown(), flush=True)
        holds = holds and all(bar.holds for bar in report.bars)
    return 0 if holds or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
