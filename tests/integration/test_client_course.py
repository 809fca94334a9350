"""A connection that breaks in the middle of an answer, and the client that goes on elsewhere."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from chaos.link import Link
from tests.gateways import NUM_NEW, running_gateway, tokens_of
from tests.mesh import MakeCheckpoint, Mesh

from expertmesh.client import AsyncClient, Chunk, Client, request_of
from expertmesh.runtime.errors import Unavailable

PROMPT = [5, 17, 40, 90, 7]


@asynccontextmanager
async def linked_gateway(mesh: Mesh, path: Path) -> AsyncIterator[Link]:
    """A link to a gateway of its own."""
    async with (
        running_gateway(mesh, path, deterministic=True) as address,
        Link(address) as link,
    ):
        yield link


async def broken_after(first: int, *links: Link) -> list[Chunk]:
    """All chunks of an answer; after the first ones, the connection they came by is cut."""
    chunks = []
    async with AsyncClient("ipv4:" + ",".join(link.address for link in links)) as client:
        request = request_of(PROMPT, max_new_tokens=NUM_NEW, ignore_eos=True)
        before = [link.num_bytes for link in links]
        async for chunk in client.generate(request, timeout_s=30):
            chunks.append(chunk)
            if len(chunks) == first:
                grown = [link.num_bytes - had for link, had in zip(links, before, strict=True)]
                await links[grown.index(max(grown))].cut()
    return chunks


def ids(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.tokens]


async def test_the_answer_goes_on_at_another_gateway(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    await mesh.replicas(path, 2)
    async with linked_gateway(mesh, path) as one, linked_gateway(mesh, path) as other:
        expected = await tokens_of(one.address, PROMPT)
        chunks = await broken_after(3, one, other)
    assert ids(chunks) == expected
    assert chunks[-1].finish_reason == "length"
    assert (chunks[-1].prompt_tokens, chunks[-1].generated_tokens) == (len(PROMPT), NUM_NEW)


async def test_with_one_gateway_it_goes_on_once_that_is_back(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("mixtral")
    await mesh.replicas(path, 2)
    async with linked_gateway(mesh, path) as link:
        expected = await tokens_of(link.address, PROMPT)
        going_on = asyncio.ensure_future(broken_after(2, link))
        await asyncio.wait({going_on}, timeout=0.5)
        assert not going_on.done()
        await link.mend()
        assert ids(await going_on) == expected


def test_a_gateway_that_never_comes_back_is_an_error() -> None:
    with pytest.raises(Unavailable), Client("127.0.0.1:1") as client:
        list(client.generate(PROMPT, timeout_s=10))
