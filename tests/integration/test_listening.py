"""What a server says before it listens: a certificate that
cannot be used, an address that is not safe.
"""

import contextlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from benchmarks.harness.certificates import Authority, Pair
from tests.mesh import HOST

from expertmesh.runtime.errors import ConfigError, ExpertMeshError
from expertmesh.runtime.security.identity import mesh_dns, mesh_uri
from expertmesh.runtime.security.server import ServerSecurity
from expertmesh.runtime.security.settings import TlsSettings
from expertmesh.runtime.server import MeshServer, running


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


def unreadable(pair: Pair, authority: Authority, mesh: str) -> tuple[TlsSettings, str]:
    return pair.tls(cert_file="/nowhere/x.pem"), "/nowhere/x.pem cannot be read"


def anothers_key(pair: Pair, authority: Authority, mesh: str) -> tuple[TlsSettings, str]:
    return pair.tls(key_file=authority.of_mesh(mesh).key_file), "not the key of the certificate"


def ended(pair: Pair, authority: Authority, mesh: str) -> tuple[TlsSettings, str]:
    return authority.of_mesh(mesh, lasts=timedelta(hours=-1)).tls(), "valid now, this one ended"


def nameless(pair: Pair, authority: Authority, mesh: str) -> tuple[TlsSettings, str]:
    missing = rf"missing: \['DNS:{mesh_dns(mesh)}', 'URI:{mesh_uri(mesh)}'\]"
    return authority.pair("nameless").tls(), missing


def no_ca(pair: Pair, authority: Authority, mesh: str) -> tuple[TlsSettings, str]:
    return pair.tls(ca_file=pair.key_file), "ca_file: expected certificates in PEM"


@pytest.mark.parametrize("wrong", [unreadable, anothers_key, ended, nameless, no_ca])
async def test_what_is_wrong_with_files_is_said_at_the_start(
    authority: Authority, wrong: Callable[[Pair, Authority, str], tuple[TlsSettings, str]]
) -> None:
    tls, message = wrong(authority.of_mesh("m"), authority, "m")
    server = MeshServer([], lambda server: None, security=ServerSecurity(tls, "m"))
    with pytest.raises(ConfigError, match=message):
        await server.start(HOST)
    with contextlib.suppress(ExpertMeshError):
        await server.stop(0)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "[::]", "", "example.com"])
async def test_no_plaintext_outside_of_this_machine(host: str) -> None:
    server = MeshServer([], lambda server: None)
    with pytest.raises(ConfigError, match=r"security\.tls\.cert_file.*security\.insecure"):
        await server.start(host)
    await server.stop(0)


async def test_insecure_is_possible_and_said(caplog: pytest.LogCaptureFixture) -> None:
    server = MeshServer([], lambda server: None, security=ServerSecurity(insecure=True))
    async with running(server, "0.0.0.0"):
        pass
    assert [r.levelname for r in caplog.records if "security.insecure" in r.message] == ["WARNING"]


async def test_plaintext_on_loopback_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with running(MeshServer([], lambda server: None), HOST):
        pass
    assert [r.levelname for r in caplog.records if "not encrypted" in r.message] == ["INFO"]
