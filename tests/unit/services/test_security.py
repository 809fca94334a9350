"""What keeps a mesh from starting for reasons of security, before anything starts."""

from typing import Any

import pytest

from expertmesh.runtime.config import validate
from expertmesh.runtime.errors import ConfigError
from expertmesh.services import cli
from expertmesh.services.security import authenticators, check_security, public_security
from expertmesh.services.settings import MeshSettings


def settings_of(**sections: Any) -> MeshSettings:
    return validate(MeshSettings, {"model": "m"} | sections)


@pytest.mark.parametrize("section", ["router", "gateway", "experts"])
@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "node-3", ""])
def test_plaintext_stays_on_this_machine(section: str, host: str) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.host: .*security\.tls\.cert_file"):
        check_security(settings_of(**{section: {"host": host}}))
    check_security(settings_of(**{section: {"host": host}}, security={"insecure": True}))
    check_security(settings_of(**{section: {"host": "::1"}}))


def test_serve_says_so_before_it_starts_anything(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["serve", "examples/demo-moe", "--set", "gateway.host=0.0.0.0"]
    assert cli.main(args) == cli.USER_ERROR
    assert capsys.readouterr().err.startswith("error: gateway.host: 0.0.0.0 can be reached")


def test_certificates_that_are_not_there() -> None:
    tls = {"cert_file": "/nowhere/crt", "key_file": "/nowhere/key", "ca_file": "/nowhere/ca"}
    with pytest.raises(ConfigError, match="/nowhere/crt cannot be read"):
        check_security(settings_of(security={"tls": tls}))


def test_a_file_of_tokens_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="/nowhere"):
        check_security(settings_of(security={"tokens_file": "/nowhere"}))


def test_ps_shall_show_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["serve", "examples/demo-moe", "--set", "redis.password=very-secret"]
    assert cli.main(args) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert "(ps)" in error
    assert "very-secret" not in error


def test_nobody_guards_what_everybody_may_call() -> None:
    """The guard costs something for each call."""
    assert public_security(settings_of().security, "m").guard is None
    limited = settings_of(security={"limits": {"running_calls": 1}}).security
    assert public_security(limited, "m").guard is not None
    assert authenticators(limited) == []
