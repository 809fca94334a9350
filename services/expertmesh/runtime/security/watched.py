"""A value that files hold, read again when they change."""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from expertmesh.runtime.errors import ConfigError

logger = logging.getLogger(__name__)

RECHECK_S = 1.0
T = TypeVar("T")
Stamp = tuple[tuple[int, int, int] | None, ...]


class Watched(Generic[T]):
    """Any thread may `get`.

    A new version that cannot be used is logged, and the last good one stays: a half-written file
    must not close a running server. Secrets mounted by Kubernetes and files replaced by `mv` are
    noticed alike.

    Args:
        what: names the files in the log.
        load: reads them; ConfigError says what is wrong with them.
        recheck_s: the files are looked at no more often than this.

    Raises:
        ConfigError: the first version cannot be used.
    """

    def __init__(
        self,
        what: str,
        files: Sequence[str],
        load: Callable[[], T],
        *,
        recheck_s: float = RECHECK_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._files = files
        self._load = load
        self._recheck_s = recheck_s
        self._clock = clock
        self._lock = threading.Lock()
        self._checked_s = clock()
        self._stamp = self._read_stamp()
        self._value = load()

    def get(self) -> T:
        """The newest version that could be used."""
        with self._lock:
            now_s = self._clock()
            if now_s - self._checked_s >= self._recheck_s:
                self._checked_s = now_s
                self._refresh()
            return self._value

    def _refresh(self) -> None:
        stamp = self._read_stamp()  # before reading: a change while reading is seen next time
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._value = self._load()
        except ConfigError as error:
            logger.error("%s: the new version is not used: %s", self._what, error.message)
        else:
            logger.info("%s: read again", self._what)

    def _read_stamp(self) -> Stamp:
        return tuple(_stamp(file) for file in self._files)


def _stamp(file: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def read_file(file: str, field: str) -> bytes:
    """The content of a small file that a setting names; ConfigError naming the setting."""
    try:
        with open(file, "rb") as opened:
            return opened.read()
    except OSError as error:
        raise ConfigError(
            f"{field}: {file} cannot be read: {error.strerror}", field=field
        ) from None
