"""How ranges of ports are written."""

import pytest

from expertmesh.runtime.ports import parse_ports


@pytest.mark.parametrize(
    ("text", "ports"), [("", [0]), ("20000", [20000]), ("20000-20002", [20000, 20001, 20002])]
)
def test_ranges(text: str, ports: list[int]) -> None:
    assert list(parse_ports(text)) == ports


@pytest.mark.parametrize("text", ["0", "5-4", "1-65536", "a", "1-", "-1", "1,2", "1 - 2"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected ports like"):
        parse_ports(text)
