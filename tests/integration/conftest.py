"""What integration tests share: one Redis server for the session, tiny checkpoints made once, and a
mesh of its own for each test."""

import itertools
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from tests.checkpoints import tiny_checkpoint
from tests.mesh import MakeCheckpoint, Mesh

from expertmesh.runtime.redis_server import EmbeddedRedis

_numbers = itertools.count()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def redis_url() -> AsyncIterator[str]:
    """A server that all tests share; their meshes have different names."""
    async with EmbeddedRedis() as server:
        yield server.url


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """`tests.checkpoints.tiny_checkpoint`, made once per family and options. Never write to it."""
    made: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = f"{family} {sorted(options.items())}"
        if key not in made:
            made[key] = tiny_checkpoint(family, tmp_path_factory.mktemp(family), **options)
        return made[key]

    return make


@pytest.fixture
def one_thread() -> Iterator[None]:
    """float32 bits depend on the number of threads; replicas have one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """Replicas set up the log of their process, which here is the test's."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
async def mesh(redis_url: str, one_thread: None, restored_logging: None) -> AsyncIterator[Mesh]:
    """An empty mesh."""
    async with Mesh(redis_url, f"test-{next(_numbers)}") as empty:
        yield empty
