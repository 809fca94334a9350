"""Limits of callers on a router's real port."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tests.mesh import MakeCheckpoint, Mesh, Router
from tests.token_file import TokenFile, models

from expertmesh.client.failures import error_of
from expertmesh.runtime.errors import RateLimited
from expertmesh.runtime.security.access import PLAIN, Access
from expertmesh.runtime.security.settings import CallLimits, SecuritySettings
from expertmesh.v1 import router_pb2, router_pb2_grpc


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    own = TokenFile(tmp_path / "tokens.yaml", {})
    own.write(
        {"name": "routes", "scopes": ["route"]},
        {"name": "watches", "scopes": ["control"]},
        {"name": "both", "scopes": ["route", "control"]},
    )
    return own


async def test_limits_are_each_callers_own(
    mesh: Mesh, checkpoint: MakeCheckpoint, file: TokenFile
) -> None:
    file.write(
        {"name": "greedy", "scopes": ["route"]},
        {"name": "modest", "scopes": ["route"]},
        {"name": "free", "scopes": ["route"], "limits": {}},
    )
    limits = CallLimits(calls_per_s=0.001, burst_calls=2)
    security = SecuritySettings(tokens_file=str(file.path), limits=limits)
    router = await mesh.router(checkpoint("mixtral"), complete=False, security=security)
    async with grpc.aio.insecure_channel(router.target) as channel:
        call = router_pb2_grpc.RouterServiceStub(channel).ListModels
        greedy = file.access("greedy").metadata()
        asked = [
            call(router_pb2.ListModelsRequest(), metadata=greedy, timeout=20) for _ in range(8)
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, grpc.RpcError)]
        assert len(refused) == 6
        assert {type(error_of(error)) for error in refused} == {RateLimited}
        _, detail = rpc_status.from_call(refused[0]).details
        assert detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
    assert await models(router, file.access("modest"))
    for _ in range(8):
        assert await models(router, file.access("free"))


async def test_a_call_that_sends_nothing_takes_its_callers_place_only(
    mesh: Mesh, checkpoint: MakeCheckpoint, file: TokenFile
) -> None:
    limits = CallLimits(running_calls=1)
    security = SecuritySettings(tokens_file=str(file.path), limits=limits)
    router = await mesh.router(checkpoint("mixtral"), complete=False, security=security)
    greedy, other = file.access("routes"), file.access("both")
    async with grpc.aio.insecure_channel(router.target) as channel:
        open_call: Any = channel.stream_unary("/expertmesh.v1.RouterService/Dispatch")
        call = open_call(metadata=greedy.metadata(), timeout=60)
        await call.wait_for_connection()
        await until(lambda: refuses(router, greedy))
        assert await models(router, other)
        call.cancel()
        await until(lambda: accepts(router, greedy))


async def refuses(router: Router, access: Access) -> bool:
    """Whether the caller is above a limit."""
    try:
        await models(router, access)
    except RateLimited:
        return True
    return False


async def accepts(router: Router, access: Access) -> bool:
    return not await refuses(router, access)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(20):
        while not await holds():  # a call takes its time
            pass


async def test_callers_without_tokens_are_limited_by_their_address(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    limits = CallLimits(calls_per_s=0.001, burst_calls=1)
    router = await mesh.router(
        checkpoint("mixtral"), complete=False, security=SecuritySettings(limits=limits)
    )
    assert await models(router, PLAIN)
    with pytest.raises(RateLimited, match=r"127\.0\.0\.1: above its limit"):
        await models(router, PLAIN)
