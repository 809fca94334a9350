"""Bearer tokens on a router's real port: who gets in, what it may call, and how much."""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from benchmarks.harness.certificates import PUBLIC_NAME, Authority
from chaos.link import Link
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.mesh import MakeCheckpoint, Mesh, Router
from tests.token_file import TokenFile, models

from expertmesh.client import RouterClient
from expertmesh.router.servicer import RouterServicer
from expertmesh.runtime.channels import connect
from expertmesh.runtime.errors import (
    ConfigError,
    ExpertUnavailable,
    PermissionDenied,
    Unauthenticated,
)
from expertmesh.runtime.origin import Origin
from expertmesh.runtime.security import watched
from expertmesh.runtime.security.access import Access
from expertmesh.runtime.security.identity import mesh_dns
from expertmesh.runtime.security.settings import SecuritySettings
from expertmesh.runtime.security.tokens import new_token
from expertmesh.services.security import SCOPES
from expertmesh.services.status import MeshView
from expertmesh.v1 import generate_pb2, router_pb2, router_pb2_grpc


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    own = TokenFile(tmp_path / "tokens.yaml", {})
    own.write(
        {"name": "routes", "scopes": ["route"]},
        {"name": "watches", "scopes": ["control"]},
        {"name": "both", "scopes": ["route", "control"]},
    )
    return own


@pytest.fixture
async def router(mesh: Mesh, checkpoint: MakeCheckpoint, file: TokenFile) -> Router:
    security = SecuritySettings(tokens_file=str(file.path))
    return await mesh.router(checkpoint("mixtral"), complete=False, security=security)


async def snapshot(router: Router, access: Access) -> Any:
    """A call of ControlService."""

    def ask() -> Any:
        with MeshView(router.target, access) as view:
            return view.read()

    return await asyncio.to_thread(ask)


def test_every_public_service_has_a_scope() -> None:
    """ExpertService is the replica's; a new service needs a decision."""
    files = [router_pb2.DESCRIPTOR, generate_pb2.DESCRIPTOR]
    names = {s.full_name for f in files for s in f.services_by_name.values()}
    control = {"expertmesh.v1.ControlService", "expertmesh.v1.ControllerService"}
    assert names | control == set(SCOPES)


async def test_a_token_opens_what_its_scopes_say(router: Router, file: TokenFile) -> None:
    assert await models(router, file.access("routes"))
    assert (await snapshot(router, file.access("watches"))).mesh
    assert await models(router, file.access("both"))
    assert (await snapshot(router, file.access("both"))).mesh
    with pytest.raises(PermissionDenied, match="'control'") as refused:
        await snapshot(router, file.access("routes"))
    assert refused.value.fields == {"caller": "routes", "scope": "control"}
    with pytest.raises(PermissionDenied, match="'route'"):
        await models(router, file.access("watches"))


async def test_whose_token_it_is_is_whose_turn_it_is(
    router: Router, file: TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two connections of one caller share one caller's part of a busy replica."""
    seen: list[str] = []
    original: Any = RouterServicer._origin

    def origin(self: RouterServicer, request: Any, context: Any) -> Origin:
        seen.append(original(self, request, context).caller)
        return Origin(seen[-1])

    monkeypatch.setattr(RouterServicer, "_origin", origin)
    hidden_TD = torch.zeros(1, router.model.hidden_size)
    for name in ("routes", "both", "routes"):
        client = RouterClient(router.target, access=file.access(name))
        with client, pytest.raises(ExpertUnavailable):  # nobody holds them here
            await asyncio.to_thread(client.forward, 0, hidden_TD)
    assert seen == ["routes", "both", "routes"]


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "got none"),
        ("", "got none"),
        ("made-up", "not one that this server takes"),
        ("a.b.c", "not one that this server takes"),
    ],
)
async def test_without_a_good_token_nobody_enters(
    router: Router, token: str | None, message: str
) -> None:
    with pytest.raises(Unauthenticated, match=message) as refused:
        await models(router, Access(token=token))
    assert "made-up" not in repr(refused.value.fields) + refused.value.message


async def test_another_scheme_is_no_token(router: Router) -> None:
    async with grpc.aio.insecure_channel(router.target) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        for value in ("Basic dXNlcjpwYXNz", "Bearer", "Bearer" + "x" * 9000):
            with pytest.raises(grpc.RpcError) as refused:
                await stub.ListModels(
                    router_pb2.ListModelsRequest(), metadata=[("authorization", value)], timeout=10
                )
            assert refused.value.code() in (
                grpc.StatusCode.UNAUTHENTICATED,
                grpc.StatusCode.RESOURCE_EXHAUSTED,  # gRPC's own bound on metadata
            )


async def test_the_health_check_is_open_and_reflection_is_not(router: Router) -> None:
    async with grpc.aio.insecure_channel(router.target) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=10
        )
        assert reply.status
        listing: Any = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        )
        with pytest.raises(grpc.RpcError) as refused:
            await listing(timeout=10).read()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_refusal_comes_before_the_request(router: Router) -> None:
    """gRPC's flow control holds most of it back, so that it takes no memory here."""
    request = bytes(64 << 20)
    async with Link(router.target) as link, connect(link.address) as channel:
        dispatch: Any = channel.unary_unary("/expertmesh.v1.RouterService/Dispatch")
        with pytest.raises(grpc.RpcError) as refused:
            await dispatch(request, timeout=60)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert link.num_bytes < 16 << 20


async def test_a_revoked_token_is_out_and_a_new_one_in_without_a_restart(
    router: Router, file: TokenFile
) -> None:
    assert await models(router, file.access("routes"))
    file.write({"name": "new", "scopes": ["route"]})
    await asyncio.sleep(watched.RECHECK_S)
    assert await models(router, file.access("new"))
    with pytest.raises(Unauthenticated):
        await models(router, file.access("routes"))


async def test_a_broken_file_changes_nothing(
    router: Router, file: TokenFile, caplog: pytest.LogCaptureFixture
) -> None:
    raw = new_token()
    file.write({"name": "oops", "scopes": ["route"], "sha256": raw})
    await asyncio.sleep(watched.RECHECK_S)
    assert await models(router, file.access("routes"))
    assert "tokens.0.sha256" in caplog.text
    assert raw not in caplog.text


async def test_a_token_ends_when_it_says(
    router: Router, file: TokenFile, caplog: pytest.LogCaptureFixture
) -> None:
    hour = timedelta(hours=1)
    file.write(
        {"name": "past", "scopes": ["route"], "expires": datetime.now(UTC) - hour},
        {"name": "valid", "scopes": ["route"], "expires": datetime.now(UTC) + hour},
    )
    await asyncio.sleep(watched.RECHECK_S)
    assert await models(router, file.access("valid"))
    with pytest.raises(Unauthenticated, match="past: the token has expired"):
        await models(router, file.access("past"))


async def test_no_token_is_ever_logged(
    router: Router, file: TokenFile, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await models(router, file.access("routes"))
    for access in (file.access("watches"), Access(token="made-up-token")):
        with pytest.raises((PermissionDenied, Unauthenticated)):
            await models(router, access)
    for token in (*file.tokens.values(), "made-up-token"):
        assert token not in caplog.text


async def test_the_meshs_own_processes_need_no_token(
    mesh: Mesh, checkpoint: MakeCheckpoint, file: TokenFile, tmp_path: Path
) -> None:
    authority = Authority(tmp_path / "pki")
    own, user = authority.of_mesh(mesh.name), authority.pair("user", dns=["user.example.com"])
    security = SecuritySettings(tls=own.tls(client_auth="required"), tokens_file=str(file.path))
    router = await mesh.router(checkpoint("mixtral"), complete=False, security=security)
    assert await models(router, own.access(mesh_dns(mesh.name)))
    with pytest.raises(Unauthenticated):
        await models(router, user.access(PUBLIC_NAME))
    with_token = file.access("routes", ca_file=own.ca_file, cert_file=user.cert_file,
                             key_file=user.key_file)  # fmt: skip
    assert await models(router, with_token)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens: [{name: a, sha256: short, scopes: []}]", r"tokens\.0\.sha256"),
        ("tokens: [{name: a, scopes: [everything]}]", r"tokens\.0\.scopes"),
        ("tokens: [{name: a, token: secret-in-plain}]", r"tokens\.0\.token: no such field"),
        ("nothing: here", "tokens: Field required"),
        ("- just a list", "expected fields"),
    ],
)
def test_a_wrong_file_is_refused_at_the_start(
    tmp_path: Path, text: str, message: str, public: Callable[[SecuritySettings], Any]
) -> None:
    file = tmp_path / "tokens.yaml"
    file.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=message) as wrong:
        public(SecuritySettings(tokens_file=str(file)))
    assert "secret-in-plain" not in str(wrong.value)


@pytest.fixture
def public() -> Callable[[SecuritySettings], Any]:
    """What a router or gateway does at its start."""
    from expertmesh.services.security import public_security

    return lambda settings: public_security(settings, "m")
