"""Times as people write them: 90s, 10m, 2h, 1d."""

import re

from expertmesh.runtime.errors import InvalidInput

_UNIT_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


def parse_duration(text: str, name: str) -> float:
    """Seconds, above 0.

    Raises:
        InvalidInput: names the argument.
    """
    match = _DURATION.fullmatch(text)
    seconds = float(match[1]) * _UNIT_S[match[2]] if match else 0.0
    if not seconds:
        raise InvalidInput.of(name, expected="a time like 90s, 10m, 2h or 1d", got=repr(text))
    return seconds


def format_duration(seconds: float) -> str:
    """The largest unit that leaves at least 2 of it, rounded."""
    for unit in ("d", "h", "m"):
        if seconds >= 2 * _UNIT_S[unit]:
            return f"{seconds / _UNIT_S[unit]:.0f}{unit}"
    return f"{seconds:.0f}s"
