"""Cluster DNS: names of Services, answered with the addresses of their ready Pods. UDP, A only."""

import socket
import struct
import threading
from collections.abc import Callable

_A, _IN = 1, 1
_TTL_S = 5  # CoreDNS' own for Services
_NO_SUCH_NAME = 3
Resolve = Callable[[str], list[str] | None]


class Dns:
    """Answers at an address until it is closed.

    Args:
        resolve: name -> addresses; None if there is no such name.
    """

    def __init__(self, address: str, resolve: Resolve) -> None:
        self._resolve = resolve
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((address, 53))
        threading.Thread(target=self._serve, name="dns", daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                query, caller = self._socket.recvfrom(512)
            except OSError:
                return
            self._socket.sendto(answer(query, self._resolve), caller)


def answer(query: bytes, resolve: Resolve) -> bytes:
    """The reply to a query of one question."""
    number, _, _, _, _, _ = struct.unpack("!6H", query[:12])
    at, labels = 12, []
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode().lower())
        at += 1 + query[at]
    question = query[12 : at + 5]
    kind, _ = struct.unpack("!2H", query[at + 1 : at + 5])
    addresses = resolve(".".join(labels))
    code = _NO_SUCH_NAME if addresses is None else 0
    found = addresses if addresses and kind == _A else []
    head = struct.pack("!6H", number, 0x8580 | code, 1, len(found), 0, 0)
    records = [
        struct.pack("!3HIH", 0xC00C, _A, _IN, _TTL_S, 4) + socket.inet_aton(address)
        for address in found
    ]
    return head + question + b"".join(records)
