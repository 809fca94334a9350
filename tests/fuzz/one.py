"""Fuzzes one target with atheris until so many inputs are done: `python -m tests.fuzz.one TARGET`.

libFuzzer ends the process itself, so what is measured goes into a file as it comes.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["expertmesh"], enable_loader_override=False):
    from tests.fuzz.seeds import seeds
    from tests.fuzz.servicers import servicer_targets
    from tests.fuzz.targets import Loop, Target, pure_targets

    from expertmesh.runtime import wire

MAX_INPUT_BYTES = 4096
MAX_CPU_S = 1.0
"""Of one input. CPU time: a busy machine is no hang."""
MAX_GROWTH_MIB = 512
BACKSTOP_S = 60


class Watch:
    """Runs inputs, and raises when one takes too long or too much."""

    def __init__(self, target: Target, report: Path) -> None:
        self._target = target
        self._report = report
        self._num_inputs = 0
        self._slowest_s = 0.0
        self._start_mib = peak_mib()

    def __call__(self, data: bytes) -> None:
        started_s = time.process_time()
        self._target(data)
        took_s = time.process_time() - started_s
        self._num_inputs += 1
        growth_mib = peak_mib() - self._start_mib
        if took_s > self._slowest_s or self._num_inputs % 1000 == 0:
            self._slowest_s = max(took_s, self._slowest_s)
            self._write(growth_mib)
        assert took_s < MAX_CPU_S, f"{took_s:.1f} s of CPU"
        assert growth_mib < MAX_GROWTH_MIB, f"{growth_mib} MiB more"

    def _write(self, growth_mib: int) -> None:
        measured = {
            "inputs": self._num_inputs,
            "slowest_ms": round(self._slowest_s * 1e3, 1),
            "growth_mib": growth_mib,
        }
        self._report.write_text(json.dumps(measured), "utf-8")


def peak_mib() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    # the hand-made code for small messages, too, which otherwise go to protobuf
    wire._SMALL_BYTES = wire._UNSCANNED_BYTES = 0
    loop = Loop()
    targets = pure_targets(loop)
    if args.target not in targets:
        targets = servicer_targets(loop)
    corpus = args.folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds()[args.target]):
        (corpus / f"seed-{number}").write_bytes(seed)
    flags = [
        f"-runs={args.runs}",
        f"-seed={args.seed}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-timeout={BACKSTOP_S}",
        "-rss_limit_mb=4096",
        "-print_final_stats=1",
        f"-artifact_prefix={args.folder}/",
        str(corpus),
    ]
    watch = Watch(targets[args.target], args.folder / "measured.json")
    atheris.Setup([sys.argv[0], *flags], watch)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
