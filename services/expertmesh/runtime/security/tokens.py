"""Bearer tokens from a file that holds their hashes. Who reads the file cannot call with it."""

import hashlib
import hmac
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import AwareDatetime, Field, model_validator

from expertmesh.runtime.config import Settings, load
from expertmesh.runtime.errors import Unauthenticated
from expertmesh.runtime.security.guard import Caller
from expertmesh.runtime.security.settings import CallLimits
from expertmesh.runtime.security.watched import Watched

Scope = Literal["route", "generate", "control"]
SCOPES: tuple[Scope, ...] = ("route", "generate", "control")
"""Of RouterService, GenerateService and ControlService."""
_PREFIX = "expertmesh-"
"""By which people, and scanners for leaked secrets, know our tokens."""
_NUM_BYTES = 32


class TokenEntry(Settings):
    """One token."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.@/-]{1,100}$")
    """Who has it: in errors and logs, and by whom calls are counted."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the token, in hexadecimal."""
    scopes: frozenset[Scope]
    """What it may call."""
    expires: AwareDatetime | None = None
    """When it ends; none is never."""
    limits: CallLimits | None = None
    """Instead of `security.limits`."""


class TokenList(Settings):
    """The file."""

    tokens: tuple[TokenEntry, ...]
    """A name may have several tokens, while one replaces the other."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len({entry.sha256 for entry in self.tokens}) < len(self.tokens):
            raise ValueError("two entries have the same sha256")
        return self


class FileTokens:
    """An `Authenticator` over a file, which is read again when it changes.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(self, file: str) -> None:
        self._list = Watched("tokens", [file], lambda: load(TokenList, Path(file), env={}))

    async def caller_of(self, token: str) -> Caller | None:
        """See `Authenticator.caller_of`. All entries are compared, each in constant time."""
        digest = token_hash(token)
        found: TokenEntry | None = None
        for entry in self._list.get().tokens:
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
        if found is None:
            return None
        if found.expires is not None and found.expires <= datetime.now(UTC):
            raise Unauthenticated(f"{found.name}: the token has expired", caller=found.name)
        return Caller(found.name, frozenset(found.scopes), found.limits)


def token_hash(token: str) -> str:
    """As it stands in the file. Tokens are random, so that a plain hash tells nothing of them."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def new_token() -> str:
    """A random token."""
    return _PREFIX + secrets.token_urlsafe(_NUM_BYTES)
