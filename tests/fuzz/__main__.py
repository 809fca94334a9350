"""Fuzzes every target and prints what was done: `make fuzz`, or `make fuzz INPUTS=20000`.

Exit code 1 if any input crashed, hung or grew; it is kept in build/fuzz, to be run again.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.fuzz.seeds import seeds

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "fuzz"
COVERAGE = re.compile(r"\bDONE\s+cov: (\d+) ft: (\d+)")


def fuzz(target: str, runs: int, seed: int) -> tuple[bool, str]:
    """(whether nothing was found, one row of the table)."""
    folder = FOLDER / target.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "tests.fuzz.one", target, "--runs", str(runs)]
    command += ["--seed", str(seed), "--folder", str(folder)]
    started_s = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    took_s = time.monotonic() - started_s
    (folder / "log").write_text(done.stderr, "utf-8")
    found = COVERAGE.search(done.stderr)
    measured = json.loads((folder / "measured.json").read_text("utf-8"))
    is_good = done.returncode == 0 and found is not None
    edges = found[1] if found else "-"
    row = (
        f"| {target} | {runs if is_good else measured['inputs']:,} | {edges} | "
        f"{measured['slowest_ms']:g} ms | {measured['growth_mib']} MiB | {took_s:.0f} s | "
        f"{'nothing' if is_good else f'see {folder.relative_to(ROOT)}'} |"
    )
    return is_good, row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_040_000, help="over all targets")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="targets")
    args = parser.parse_args()
    names = args.only or sorted(seeds())
    print("| target | inputs | edges | slowest (CPU) | memory grew by | took | found |")
    print("|---|---|---|---|---|---|---|", flush=True)
    good = True
    for name in names:
        is_good, row = fuzz(name, args.inputs // len(names), args.seed)
        good &= is_good
        print(row, flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
