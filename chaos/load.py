"""Callers of a mesh, in a process of their own."""

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chaos.caller import CallerArgs
from chaos.calls import RECORD, Calls
from expertmesh.runtime.child import dying_with_parent

WARM_UP_CALLS = 50
_POLL_S = 0.01
_STOP_S = 40.0


class Load:
    """A caller process that runs. Create with `ChaosMesh.load`."""

    def __init__(self, process: "subprocess.Popen[str]", records: Path) -> None:
        self.errors: list[dict[str, Any]] = []
        """Kinds of error, once it has stopped."""
        self._process = process
        self._records = records

    @property
    def num_calls(self) -> int:
        """Done until now."""
        return self._records.stat().st_size // RECORD.itemsize if self._records.exists() else 0

    async def until(self, num_calls: int, timeout_s: float) -> None:
        """Wait until that many calls are done, or the time is over."""
        end_s = time.monotonic() + timeout_s
        while self.num_calls < num_calls and time.monotonic() < end_s:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)

    async def stop(self) -> Calls:
        """Let it finish and take what it has seen."""
        self._process.terminate()
        async with asyncio.timeout(_STOP_S):
            out, _ = await asyncio.to_thread(self._process.communicate)
        self.errors = json.loads(out)
        kinds = [error["reason"] for error in self.errors]
        return Calls.of(self._records.read_bytes(), kinds)


def start_caller(args: CallerArgs) -> "subprocess.Popen[str]":
    """A process that calls from now on."""
    command = [sys.executable, "-m", "chaos.caller", json.dumps(asdict(args))]
    return subprocess.Popen(dying_with_parent(command), stdout=subprocess.PIPE, text=True)
