"""The server's side: its certificate, and whether it may listen without one."""

import logging
from dataclasses import dataclass, field
from typing import Any

import grpc

from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.security.access import Access, is_loopback
from expertmesh.runtime.security.guard import Guard
from expertmesh.runtime.security.identity import check_ca, check_pair, mesh_dns
from expertmesh.runtime.security.settings import TlsSettings
from expertmesh.runtime.security.watched import Watched, read_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerSecurity:
    """How a server of the mesh protects itself.

    Args:
        tls: certificate files; not enabled is plaintext, allowed on loopback.
        mesh: name of the mesh whose identity the certificate has.
        requires_certificate: callers must have a certificate of the CA.
        guard: lets calls in; None lets in all.
        insecure: plaintext is allowed everywhere.
    """

    tls: TlsSettings = field(default_factory=TlsSettings)
    mesh: str = ""
    requires_certificate: bool = False
    guard: Guard | None = None
    insecure: bool = False

    def listen(self, server: grpc.aio.Server, host: str, port: int) -> int:
        """Bind the port. Returns it.

        Raises:
            ConfigError: a certificate cannot be used, or there is none and the address is not
                loopback.
            RuntimeError: the address cannot be bound.
        """
        if self.tls.enabled:
            credentials = server_credentials(self.tls, self.mesh, self.requires_certificate)
            return server.add_secure_port(f"{host}:{port}", credentials)
        self._accept_plaintext(host)
        return server.add_insecure_port(f"{host}:{port}")

    def _accept_plaintext(self, host: str) -> None:
        if is_loopback(host):
            logger.info("gRPC is not encrypted: %s is reached from this machine only", host)
            return
        check_plaintext("host", host, insecure=self.insecure)
        logger.warning("gRPC is not encrypted on %s, as security.insecure allows it", host)


def check_plaintext(field: str, host: str, *, insecure: bool) -> None:
    """Raise ConfigError if a server without TLS must not listen on `host`.

    Args:
        field: the setting that holds the host.
    """
    if not insecure and not is_loopback(host):
        raise ConfigError(
            f"{field}: {host or 'the address of the node'} can be reached from other machines, and "
            "there is no TLS; set security.tls.cert_file, key_file and ca_file, or "
            "security.insecure: true if everybody there may use and stop the model",
            field=field,
        )


def server_credentials(
    tls: TlsSettings, mesh: str, requires_certificate: bool
) -> grpc.ServerCredentials:
    """Credentials that take changed files into use with the next connection.

    Raises:
        ConfigError: the files cannot be used.
    """
    files = [str(file) for file in (tls.cert_file, tls.key_file, tls.ca_file)]

    def load() -> grpc.ServerCertificateConfiguration:
        cert_pem, key_pem, ca_pem = (read_file(file, "security.tls") for file in files)
        check_pair(cert_pem, key_pem, mesh)
        check_ca(ca_pem)
        return grpc.ssl_server_certificate_configuration([(key_pem, cert_pem)], ca_pem)

    watched = Watched("certificates", files, load)
    current = watched.get()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """For gRPC, at each handshake: None says that nothing is new."""
        nonlocal current
        newest = watched.get()
        if newest is current:
            return None
        current = newest
        return newest

    # its stub does not know that the function may return None
    fetch: Any = changed
    return grpc.dynamic_ssl_server_credentials(current, fetch, requires_certificate)


def mesh_access(tls: TlsSettings, mesh: str) -> Access:
    """How processes of a mesh reach each other: by its identity, whatever the address."""
    if not tls.enabled:
        return Access()
    return Access(
        ca_file=tls.ca_file,
        cert_file=tls.cert_file,
        key_file=tls.key_file,
        server_name=mesh_dns(mesh),
    )
