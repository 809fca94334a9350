"""The client's side: whom it trusts, how it proves who it is."""

import ipaddress
from dataclasses import dataclass, field

import grpc

from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.security.watched import read_file

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Access:
    """How to connect. Files are read whenever a connection is made, a token's for every call.

    Args:
        tls: encrypt, and trust the system's CAs; any of the four below switches it on as well.
        ca_file: CA that must have signed the server's certificate, PEM.
        cert_file: own certificate, for servers that ask for one.
        key_file: its private key.
        server_name: name that the server's certificate must have; default the one in the address.
        token_file: file with the bearer token, and nothing else.
        token: the bearer token itself.
    """

    tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None
    token_file: str | None = None
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise ConfigError("tls: a certificate and its key go together", field="tls")

    @property
    def is_encrypted(self) -> bool:
        """Whether connections use TLS."""
        return self.tls or any((self.ca_file, self.cert_file, self.server_name))

    def credentials(self, address: str) -> grpc.ChannelCredentials | None:
        """For a channel to `address`; None is plaintext.

        Raises:
            ConfigError: a file cannot be read, or a token would be sent readable for everybody.
        """
        if self.is_encrypted:
            files = (self.ca_file, self.key_file, self.cert_file)
            return grpc.ssl_channel_credentials(
                *(read_file(f, "tls") if f else None for f in files)
            )
        if (self.token or self.token_file) and not is_loopback(host_of(address)):
            raise ConfigError(
                f"token: {address} is not this machine, and without TLS everybody on the way could "
                "read the token; give the CA of the server (--tls-ca)",
                field="token",
            )
        return None

    def options(self) -> list[tuple[str, str]]:
        """Of a channel, for the name that is expected."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []

    def metadata(self) -> Metadata:
        """The token, as calls carry it; empty without one.

        Raises:
            ConfigError: the file cannot be read, or holds no token.
        """
        token = self.token
        if self.token_file is not None:
            token = read_file(self.token_file, "token_file").decode("ascii", "replace").strip()
            if not token or not token.isprintable() or not token.isascii():
                message = f"token_file: {self.token_file} holds no token"
                raise ConfigError(message, field="token_file")
        return (("authorization", f"Bearer {token}"),) if token else ()


PLAIN = Access()
"""Plaintext, without a token."""


def host_of(address: str) -> str:
    """ "[::1]:80" -> "::1", "dns:///h:80" -> "h"."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    return (host if port.isdigit() else address).strip("[]")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach, or be reached at, this host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: who knows where it leads
        return False
