"""Certificates for tests and benchmarks: a CA of their own, and leaves of it, good and bad."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from expertmesh.runtime.security.access import Access
from expertmesh.runtime.security.identity import mesh_dns, mesh_uri
from expertmesh.runtime.security.settings import TlsSettings

DAY = timedelta(days=1)
PUBLIC_NAME = "mesh.example.com"


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files."""

    cert_file: str
    key_file: str
    ca_file: str

    def tls(self, **more: str) -> TlsSettings:
        """Settings of a process of the mesh."""
        files = {"cert_file": self.cert_file, "key_file": self.key_file, "ca_file": self.ca_file}
        return TlsSettings.model_validate(files | more)

    def access(self, server_name: str) -> Access:
        """A client that shows this certificate."""
        return Access(
            ca_file=self.ca_file,
            cert_file=self.cert_file,
            key_file=self.key_file,
            server_name=server_name,
        )

    def content(self) -> tuple[bytes, bytes]:
        """(key, certificate), as gRPC wants them."""
        return Path(self.key_file).read_bytes(), Path(self.cert_file).read_bytes()

    def spoil_key(self, text: str) -> None:
        """Put something else into the file of the key."""
        Path(self.key_file).write_text(text, encoding="utf-8")

    def replaced_by(self, other: "Pair") -> None:
        """Put another pair into this one's files."""
        for name in ("key_file", "cert_file"):
            Path(getattr(self, name)).write_bytes(Path(getattr(other, name)).read_bytes())


@dataclass
class Authority:
    """Signs certificates and puts them into a folder."""

    folder: Path
    name: str = "ca"
    _key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )
    _num_signed: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        built = self._builder(self.name, self._key.public_key(), DAY)
        certificate = built.add_extension(constraints, True).sign(self._key, hashes.SHA256())
        self.ca_file = str(self.folder / f"{self.name}.pem")
        Path(self.ca_file).write_bytes(certificate.public_bytes(Encoding.PEM))

    def _builder(
        self, subject: str, key: ec.EllipticCurvePublicKey, lasts: timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(_name(subject))
            .issuer_name(_name(self.name))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 3 * DAY)
            .not_valid_after(now + lasts)
        )

    def of_mesh(self, mesh: str, *, lasts: timedelta = DAY) -> Pair:
        """Of a process of the mesh that can be called at 127.0.0.1 and PUBLIC_NAME as well."""
        names = [mesh_dns(mesh), PUBLIC_NAME, "localhost"]
        return self.pair(f"process of {mesh}", uris=[mesh_uri(mesh)], dns=names, lasts=lasts)

    def pair(
        self,
        subject: str,
        *,
        uris: list[str] | None = None,
        dns: list[str] | None = None,
        ip: str = "127.0.0.1",
        lasts: timedelta = DAY,
    ) -> Pair:
        """Any certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [
            x509.IPAddress(ip_address(ip)),
            *map(x509.UniformResourceIdentifier, uris or ()),
            *map(x509.DNSName, dns or ()),
        ]
        builder = self._builder(subject, key.public_key(), lasts)
        alternative = x509.SubjectAlternativeName(names)
        certificate = builder.add_extension(alternative, False).sign(self._key, hashes.SHA256())
        self._num_signed += 1
        base = self.folder / f"{self.name}-{self._num_signed}"
        cert, private = base.with_suffix(".crt"), base.with_suffix(".key")
        cert.write_bytes(certificate.public_bytes(Encoding.PEM))
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return Pair(str(cert), str(private), self.ca_file)
