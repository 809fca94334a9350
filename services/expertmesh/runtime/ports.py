"""A range of ports to listen on, as it is written in configuration: "20000-20015". Pure."""

import re
from typing import Annotated

from pydantic import AfterValidator

_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")
_GREATEST = 65535


def parse_ports(text: str) -> range:
    """ "20000-20015" and "20000" are what they say; "" is port 0, which lets the kernel choose.

    Raises:
        ValueError: anything else.
    """
    if not text:
        return range(1)
    match = _RANGE.fullmatch(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= _GREATEST:
        raise ValueError('expected ports like "20000-20015", from 1 to 65535, ascending')
    return range(first, last + 1)


def _checked(text: str) -> str:
    parse_ports(text)
    return text


PortRange = Annotated[str, AfterValidator(_checked)]
