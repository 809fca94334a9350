"""README's commands, as a newcomer would type them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return [body for name, body in _BLOCK.findall(README.read_text("utf-8")) if name == language]


def commands() -> list[str]:
    """Every shell line, in order."""
    return [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
