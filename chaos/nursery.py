"""A process that has imported what replicas and routers need, and forks one when asked: `Nursery`.

Importing torch takes seconds of CPU. A replacement on another host would not take them from the
survivors; on this machine it would, and the drills would measure imports. Here a process is there
in 0.1 s.
"""

import asyncio
import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

from expertmesh.runtime.child import dying_with_parent

_READY_S = 60.0
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNET = 0x40000000


class Nursery:
    """Starts processes while `async with` lasts; all that live are killed at its end.

    Args:
        env: environment variables of all of them, beside those of this process.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("EXPERTMESH_")}
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._env = {**inherited, **one_thread, **(env or {})}
        self._heard: dict[tuple[str, str], asyncio.Future[str]] = {}
        """By what is said of whom."""

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *dying_with_parent([sys.executable, "-m", "chaos.nursery"]),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._env,
        )
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()  # the kernel kills its children with it
        await self._process.wait()
        await self._reading

    async def replica(self, name: str, fields: Mapping[str, Any]) -> int:
        """The process id of a new replica, once it has announced itself.

        Args:
            name: not used before.
            fields: of `ExpertGroupArgs`, and of `Troubles`; `log` is a file for its log, `netns` a
                named network namespace to live in.
        """
        pid = await self._fork(name, {"replica": name, **fields})
        await self._hear("ready", name)
        return pid

    async def router(self, address: str, args: Sequence[str], log: str) -> int:
        """The process id of a new router, which need not serve yet.

        Args:
            args: of `expertmesh router`.
        """
        return await self._fork(address, {"router": address, "args": args, "log": log})

    async def _fork(self, name: str, fields: Mapping[str, Any]) -> int:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(fields).encode() + b"\n")
        return int(await self._hear("pid", name))

    async def _hear(self, what: str, name: str) -> str:
        heard = self._heard.setdefault((what, name), asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(_READY_S):
                return await heard
        finally:
            del self._heard[what, name]

    async def _read(self) -> None:
        assert self._process.stdout
        loop = asyncio.get_running_loop()
        while line := await self._process.stdout.readline():
            what, name, value = line.decode().split(" ", 2)
            self._heard.setdefault((what, name), loop.create_future()).set_result(value)
        for heard in self._heard.values():
            heard.cancel()


def _say(what: str, name: str, value: object = "") -> None:
    os.write(1, f"{what} {name} {value}\n".encode())  # short: never mixed with another's


def _enter_network(name: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(os.open(f"/run/netns/{name}", os.O_RDONLY), _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter network namespace {name}")


def _run_replica(fields: dict[str, Any]) -> None:
    import uvloop

    from chaos.replica import Troubles, run_replica
    from expertmesh.experts.deployment import ExpertGroupArgs

    name = fields.pop("replica")
    own = {key: fields.pop(key) for key in Troubles.__dataclass_fields__ if key in fields}
    args, troubles = ExpertGroupArgs(**fields), Troubles(**own)
    uvloop.run(run_replica(args, name, troubles, lambda: _say("ready", name)))


def _live(fields: dict[str, Any]) -> NoReturn:
    """The life of a child."""
    os.dup2(os.open(fields.pop("log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    if netns := fields.pop("netns", ""):
        _enter_network(netns)
    code = 0
    if "router" in fields:
        from expertmesh.services import cli

        code = cli.main(["router", *fields["args"]])
    else:
        _run_replica(fields)
    os._exit(code)


def _main() -> None:
    from chaos import replica  # noqa: F401  # with torch, before the first fork
    from expertmesh.services import router  # noqa: F401

    assert threading.active_count() == 1, "a fork would lose threads"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    nursery = os.getpid()
    for line in sys.stdin:
        fields = json.loads(line)
        pid = os.fork()
        if pid:
            _say("pid", fields.get("replica") or fields["router"], pid)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != nursery:
            os._exit(1)
        _live(fields)


if __name__ == "__main__":
    _main()
