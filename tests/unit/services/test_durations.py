"""Times as people write them."""

import pytest

from expertmesh.runtime.errors import InvalidInput
from expertmesh.services.durations import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("7d", 604800)]
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text, "--for") == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "-1m", "0s", "10 m", "1w", "1e3s"])
def test_what_is_no_time_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidInput, match="--for: expected a time like 90s"):
        parse_duration(text, "--for")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (119, "119s"), (540, "9m"), (7300, "2h"), (200000, "2d")]
)
def test_times_are_shown(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
