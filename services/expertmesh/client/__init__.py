"""The public client: text from a gateway, and a mesh's experts inside your own transformers script.

Importing it costs no torch; what needs torch is imported when first used.
"""

from typing import TYPE_CHECKING, Any

from expertmesh.client.course import Chunk
from expertmesh.client.generate import AsyncClient, Client, Wanted, request_of
from expertmesh.runtime.security.access import PLAIN, Access

if TYPE_CHECKING:
    from expertmesh.client.router import RouterClient

__all__ = [
    "Access",
    "AsyncClient",
    "Chunk",
    "Client",
    "RouterClient",
    "Wanted",
    "attach",
    "register",
    "request_of",
]


def attach(model: Any, target: "str | RouterClient", access: Access = PLAIN) -> Any:
    """Replace the experts of a loaded transformers model by those of a mesh; returns the model.

    Args:
        model: any Mixture-of-Experts `PreTrainedModel`; the memory of its experts is freed.
        target: "host:port" of a router that serves the same checkpoint, or a client of one, which
            says what to do when experts are missing and what that has cost.
        access: certificates and token for a "host:port"; the default is plaintext without a token.

    Raises:
        UnsupportedCheckpoint: the model has no experts that can be called remotely.
    """
    from expertmesh.client.hooks import attach_caller

    return attach_caller(model, _client(target, access))


def _client(target: "str | RouterClient", access: Access) -> "RouterClient":
    from expertmesh.client.router import RouterClient  # imports torch

    return RouterClient(target, access=access) if isinstance(target, str) else target


def register(target: "str | RouterClient", access: Access = PLAIN) -> None:
    """Make `from_pretrained(..., experts_implementation="expertmesh")` use the experts of a mesh.

    Args:
        target, access: as for `attach`.
    """
    from expertmesh.client.hooks import register_caller

    register_caller(_client(target, access))


def __getattr__(name: str) -> Any:
    if name == "RouterClient":
        from expertmesh.client.router import RouterClient

        return RouterClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
