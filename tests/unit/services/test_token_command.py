"""`expertmesh token`."""

import pytest
import yaml

from expertmesh.runtime.security.tokens import TokenList, token_hash
from expertmesh.services import cli


def test_what_it_prints_is_a_token_and_its_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["token", "alice", "--scopes", "route", "control"]) == 0
    printed = capsys.readouterr()
    token = printed.out.strip()
    _, _, entry = printed.err.partition("\n")
    (parsed,) = TokenList.model_validate({"tokens": yaml.safe_load(entry)}).tokens
    assert parsed.name == "alice"
    assert sorted(parsed.scopes) == ["control", "route"]
    assert parsed.sha256 == token_hash(token)
    assert token not in printed.err
    assert len(token) > 40


def test_no_two_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert cli.main(["token", "alice"]) == 0
    first, second = capsys.readouterr().out.split()
    assert first != second


def test_a_name_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["token", "two words"]) == cli.USER_ERROR
    assert "name" in capsys.readouterr().err
