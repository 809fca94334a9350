"""A gateway inside the test's process, over the replicas of a mesh."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.mesh import HOST, MODEL, Mesh

from expertmesh.client.generate import AsyncClient, request_of
from expertmesh.runtime.channels import DEFAULT_MAX_MESSAGE_BYTES
from expertmesh.services.gateway.args import GatewayArgs
from expertmesh.services.gateway.gateway import Gateway
from expertmesh.services.health import wait_serving

NUM_NEW = 16
READY_S = 20.0


@asynccontextmanager
async def running_gateway(mesh: Mesh, path: Path, **changes: Any) -> AsyncIterator[str]:
    """A gateway of this mesh; yields its address."""
    fields: dict[str, Any] = {
        "host": HOST,
        "port": 0,
        "model_dir": str(path),
        "model": MODEL,
        "redis_url": mesh.redis_url,
        "mesh": mesh.name,
        "dtype": "auto",
        "deterministic": False,
        "max_message_bytes": DEFAULT_MAX_MESSAGE_BYTES,
        "otlp_endpoint": None,
        "log_level": "WARNING",
        "kv_cache_tokens": 2048,
        "max_batch_tokens": 128,
    }
    gateway = await Gateway.start(GatewayArgs(**(fields | changes)))
    try:
        await wait_serving(gateway.address, READY_S)
        yield gateway.address
    finally:
        await gateway.stop()


async def tokens_of(address: str, prompt: list[int], num_new: int = NUM_NEW) -> list[int]:
    async with AsyncClient(address) as client:
        request = request_of(prompt, max_new_tokens=num_new, ignore_eos=True)
        return [token async for chunk in client.generate(request) for token in chunk.tokens]
