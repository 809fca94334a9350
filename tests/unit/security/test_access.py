"""The client's side of security, and what no text may show."""

from pathlib import Path

import pytest

from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.security.access import PLAIN, Access, host_of, is_loopback
from expertmesh.runtime.security.settings import OidcSettings, SecuritySettings, TlsSettings

SECRET = "correct-horse-battery-staple"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("", False),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
    ],
)
def test_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("127.0.0.1:50051", "127.0.0.1"),
        ("[::1]:50051", "::1"),
        ("dns:///mesh.example.com:1", "mesh.example.com"),
        ("mesh.example.com", "mesh.example.com"),
    ],
)
def test_the_host_of_an_address(address: str, host: str) -> None:
    assert host_of(address) == host


def test_a_token_is_read_for_every_call_and_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\n")
    access = Access(token_file=str(file))
    assert access.metadata() == (("authorization", f"Bearer {SECRET}"),)
    file.write_text("another")
    assert access.metadata() == (("authorization", "Bearer another"),)
    assert SECRET not in repr(Access(token=SECRET))
    assert PLAIN.metadata() == ()


@pytest.mark.parametrize("content", ["", "\n", "two\nlines", "\u00e9", "\x00"])
def test_a_file_without_a_token_is_an_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "token"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no token"):
        Access(token_file=str(file)).metadata()
    with pytest.raises(ConfigError, match="cannot be read"):
        Access(token_file=str(tmp_path / "missing")).metadata()


def test_a_token_does_not_leave_the_machine_readable() -> None:
    access = Access(token=SECRET)
    assert access.credentials("127.0.0.1:1") is None
    with pytest.raises(ConfigError, match="everybody on the way") as refused:
        access.credentials("mesh.example.com:1")
    assert SECRET not in str(refused.value)
    assert Access(token=SECRET, tls=True).credentials("mesh.example.com:1")


def test_a_certificate_needs_its_key() -> None:
    with pytest.raises(ConfigError, match="go together"):
        Access(cert_file="x")


@pytest.mark.parametrize("given", [("cert_file",), ("cert_file", "key_file"), ("ca_file",)])
def test_tls_is_all_or_nothing(given: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="missing"):
        TlsSettings.model_validate(dict.fromkeys(given, "f"))


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="only with TLS"):
        TlsSettings(client_auth="required")
    with pytest.raises(ValueError, match="issuer and audience"):
        OidcSettings(issuer="https://x")
    assert not SecuritySettings().asks_for_tokens
