"""A mesh of real processes, started by README's own `expertmesh serve` line."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from tests.e2e.readme import ROOT, commands

from expertmesh.client import Client

STOP_S = 60.0
NUM_LAST = 100


@dataclass(frozen=True)
class Served:
    """A running `expertmesh serve`."""

    process: "subprocess.Popen[str]"
    gateway: str
    router: str


def environment() -> dict[str, str]:
    """That of a shell in which this interpreter's venv is activated."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def endpoints_of(process: "subprocess.Popen[str]") -> dict[str, str]:
    """The table `serve` prints when everything is up."""
    found: dict[str, str] = {}
    assert process.stdout
    while "redis" not in found:
        line = process.stdout.readline()
        assert line, f"serve ended with code {process.wait()}"
        if match := re.match(r"(model|gateway|router|redis)\s+(\S+)", line):
            found[match[1]] = match[2]
    return found


@contextmanager
def serving() -> Iterator[Served]:
    """Start, and on leaving check that SIGTERM ends everything with code 0."""
    line = next(line for line in commands() if line.startswith("expertmesh serve"))
    process = subprocess.Popen(
        shlex.split(line), stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    )
    try:
        endpoints = endpoints_of(process)
        yield Served(process, endpoints["gateway"], endpoints["router"])
        with Client(endpoints["gateway"]) as client:
            chunks = client.generate("import os", max_new_tokens=NUM_LAST, ignore_eos=True)
            next(chunks)
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)  # text that is being generated must not be cut
            last = list(chunks)[-1]
        assert (last.finish_reason, last.generated_tokens) == ("length", NUM_LAST)
        assert process.wait(STOP_S) == 0
        _, alive = psutil.wait_procs(children, timeout=STOP_S)
        assert not alive, f"left over: {[child.cmdline()[:3] for child in alive]}"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_S)
