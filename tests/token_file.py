"""A file of tokens, the tokens that are in it, and a call with one."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tests.mesh import Router

from expertmesh.client.router import RouterClient
from expertmesh.runtime.security.access import Access
from expertmesh.runtime.security.tokens import new_token, token_hash
from expertmesh.v1 import router_pb2


@dataclass
class TokenFile:
    """A file of tokens, and the tokens."""

    path: Path
    tokens: dict[str, str]

    def write(self, *entries: dict[str, Any]) -> None:
        """Replace all entries; each gets a new token if its name has none yet."""
        for entry in entries:
            token = self.tokens.setdefault(entry["name"], new_token())
            entry.setdefault("sha256", token_hash(token))
        text = yaml.safe_dump({"tokens": list(entries)})
        self.path.write_text(text, "utf-8")

    def access(self, name: str, **more: Any) -> Access:
        """The caller of this name."""
        return Access(token=self.tokens[name], **more)


async def models(router: Router, access: Access) -> Sequence[router_pb2.ModelInfo]:
    """A call of RouterService."""

    def ask() -> Sequence[router_pb2.ModelInfo]:
        with RouterClient(router.target, timeout_s=10, access=access) as client:
            return client.models()

    return await asyncio.to_thread(ask)
