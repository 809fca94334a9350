"""The mesh's identity in certificates: who has it belongs to the mesh.

A certificate of the mesh's own processes has two subject alternative names: the URI, which replicas
look for in the certificates of their callers, and the DNS name, which routers expect of replicas
(gRPC compares names, not URIs, and a replica's address says nothing about who listens there).
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from expertmesh.runtime.errors import ConfigError, PermissionDenied

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_SETTING = "security.tls"


def mesh_uri(mesh: str) -> str:
    """The URI in the certificates of a mesh's processes."""
    return f"expertmesh://mesh/{mesh}"


def mesh_dns(mesh: str) -> str:
    """The DNS name in the certificates of a mesh's processes; nobody resolves it."""
    return f"{mesh}.expertmesh.internal"


def has_identity(auth_context: Mapping[str, Sequence[bytes]], mesh: str) -> bool:
    """Whether the peer of a connection has shown a certificate of this mesh.

    Args:
        auth_context: gRPC's, of a connection whose certificate it has verified.
    """
    return mesh_uri(mesh).encode() in auth_context.get("peer_uri", ())


def check_peer(auth_context: Mapping[str, Sequence[bytes]], mesh: str) -> None:
    """Raise PermissionDenied unless the peer belongs to the mesh."""
    if not has_identity(auth_context, mesh):
        raise PermissionDenied(
            f"only processes of the mesh may call a replica: expected the URI {mesh_uri(mesh)} in "
            "the certificate of the caller; others call a router or a gateway",
            expected=mesh_uri(mesh),
        )


def check_pair(cert_pem: bytes, key_pem: bytes, mesh: str) -> None:
    """Whether the pair can be used by a process of this mesh.

    Raises:
        ConfigError: not PEM, not a pair, expired, or without the mesh's names.
    """
    certificate = _certificate(cert_pem)
    if _public_key(key_pem) != certificate.public_key():
        raise ConfigError(
            f"{_SETTING}.key_file: not the key of the certificate in cert_file",
            field=f"{_SETTING}.key_file",
        )
    ends = certificate.not_valid_after_utc
    if ends <= datetime.now(UTC):
        raise _wrong(f"a certificate that is valid now, this one ended {ends:%Y-%m-%d %H:%M} UTC")
    missing = {f"URI:{mesh_uri(mesh)}", f"DNS:{mesh_dns(mesh)}"} - _names(certificate)
    if missing:
        raise _wrong(f"the subject alternative names of the mesh; missing: {sorted(missing)}")


def check_ca(ca_pem: bytes) -> None:
    """Raise ConfigError unless it is one certificate or several in PEM."""
    from cryptography.x509 import load_pem_x509_certificates

    try:
        load_pem_x509_certificates(ca_pem)
    except ValueError:
        message = f"{_SETTING}.ca_file: expected certificates in PEM"
        raise ConfigError(message, field=f"{_SETTING}.ca_file") from None


def _certificate(cert_pem: bytes) -> "Certificate":
    from cryptography.x509 import load_pem_x509_certificate

    try:
        return load_pem_x509_certificate(cert_pem)
    except ValueError:
        raise _wrong("a certificate in PEM") from None


def _public_key(key_pem: bytes) -> object:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(key_pem, None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # without the cause: nothing of the key may reach a log
        raise ConfigError(
            f"{_SETTING}.key_file: expected a private key in PEM, not encrypted",
            field=f"{_SETTING}.key_file",
        ) from None


def _names(certificate: "Certificate") -> set[str]:
    from cryptography import x509

    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return set()
    names = extension.value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    dns = names.get_values_for_type(x509.DNSName)
    return {f"URI:{uri}" for uri in uris} | {f"DNS:{name}" for name in dns}


def _wrong(expected: str) -> ConfigError:
    message = f"{_SETTING}.cert_file: expected {expected}"
    return ConfigError(message, field=f"{_SETTING}.cert_file")
