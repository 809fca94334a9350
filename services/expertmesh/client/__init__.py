"""The public client: text from a gateway, and a mesh's experts inside your own transformers script.

Importing it costs no torch; what needs torch is imported when first used.
"""

from typing import TYPE_CHECKING, Any

from expertmesh.client.generate import AsyncClient, Chunk, Client, request_of

if TYPE_CHECKING:
    from expertmesh.client.router import RouterClient

__all__ = ["AsyncClient", "Chunk", "Client", "RouterClient", "attach", "register", "request_of"]


def attach(model: Any, target: str) -> Any:
    """Replace the experts of a loaded transformers model by those of a mesh; returns the model.

    Args:
        model: any Mixture-of-Experts `PreTrainedModel`; the memory of its experts is freed.
        target: "host:port" of a router that serves the same checkpoint.

    Raises:
        UnsupportedCheckpoint: the model has no experts that can be called remotely.
    """
    from expertmesh.client.hooks import attach_caller
    from expertmesh.client.router import RouterClient

    return attach_caller(model, RouterClient(target))


def register(target: str) -> None:
    """Make `from_pretrained(..., experts_implementation="expertmesh")` use the experts of a mesh.

    Args:
        target: "host:port" of a router that serves the same checkpoint.
    """
    from expertmesh.client.hooks import register_caller
    from expertmesh.client.router import RouterClient

    register_caller(RouterClient(target))


def __getattr__(name: str) -> Any:
    if name == "RouterClient":
        from expertmesh.client.router import RouterClient

        return RouterClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
