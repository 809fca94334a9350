"""Certificates: who gets in, who does not, and that a new one needs no restart. Real replicas,
router and gRPC; every certificate is made here.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from benchmarks.harness.certificates import DAY, PUBLIC_NAME, Authority, Pair
from tests.mesh import HOST, MakeCheckpoint, Mesh, Router

from expertmesh.client.failures import error_of
from expertmesh.client.router import RouterClient
from expertmesh.experts.replica import Replica
from expertmesh.runtime.channels import connect
from expertmesh.runtime.errors import (
    ExpertUnavailable,
    PermissionDenied,
    Unavailable,
)
from expertmesh.runtime.security import watched
from expertmesh.runtime.security.access import PLAIN, Access
from expertmesh.runtime.security.identity import mesh_dns, mesh_uri
from expertmesh.runtime.security.settings import SecuritySettings
from expertmesh.v1 import control_pb2, expert_pb2, router_pb2

HIDDEN = 64
DESCRIBE = "/expertmesh.v1.ExpertService/Describe"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


@dataclass(frozen=True)
class Secured:
    """A mesh with TLS, without Unix sockets: everything goes over gRPC."""

    mesh: Mesh
    replica: Replica
    router: Router
    pair: Pair


@pytest.fixture
async def secured(mesh: Mesh, checkpoint: MakeCheckpoint, authority: Authority) -> Secured:
    pair = authority.of_mesh(mesh.name)
    path = checkpoint("mixtral")
    replica = await mesh.replica(path, tls=pair.tls(), local_socket=False)
    router = await mesh.router(path, security=SecuritySettings(tls=pair.tls()))
    return Secured(mesh, replica, router, pair)


async def describe(replica: Replica, access: Access) -> control_pb2.ReplicaState:
    """Ask a replica directly."""
    async with connect(replica.address, access=access) as channel:
        call: Any = channel.unary_unary(
            DESCRIBE,
            expert_pb2.DescribeRequest.SerializeToString,
            control_pb2.ReplicaState.FromString,
        )
        try:
            state: control_pb2.ReplicaState = await call(expert_pb2.DescribeRequest(), timeout=10)
        except grpc.RpcError as failure:
            raise error_of(failure) from None
    return state


async def models(target: str, access: Access) -> list[router_pb2.ModelInfo]:
    """Ask a router, off the loop."""

    def ask() -> list[router_pb2.ModelInfo]:
        with RouterClient(target, timeout_s=10, access=access) as client:
            return client.models()

    return await asyncio.to_thread(ask)


async def test_rows_go_through_a_mesh_of_certificates(secured: Secured) -> None:
    hidden_TD = torch.randn(5, HIDDEN)
    access = Access(ca_file=secured.pair.ca_file)  # 127.0.0.1 is in the certificate

    def forward() -> torch.Tensor:
        with RouterClient(secured.router.target, access=access) as client:
            return client.forward(0, hidden_TD).hidden_TD

    out_TD = await asyncio.to_thread(forward)
    assert out_TD.shape == hidden_TD.shape
    assert bool(out_TD.isfinite().all())
    assert (await describe(secured.replica, secured.pair.access(mesh_dns(secured.mesh.name)))).pid


async def test_a_client_checks_the_name(secured: Secured) -> None:
    access = Access(ca_file=secured.pair.ca_file, server_name=PUBLIC_NAME)
    assert await models(secured.router.target, access)
    with pytest.raises(Unavailable, match="Hostname"):
        await models(secured.router.target, replace(access, server_name="elsewhere.example.com"))


def of_another_ca(authority: Authority, mesh: str) -> Access:
    """Has the mesh's names, and trusts the right CA, but nobody we know has signed it."""
    own = Authority(authority.folder / "other").of_mesh(mesh)
    return replace(own.access(mesh_dns(mesh)), ca_file=authority.ca_file)


def expired(authority: Authority, mesh: str) -> Access:
    """It was good until yesterday."""
    return authority.of_mesh(mesh, lasts=-DAY).access(mesh_dns(mesh))


def without_certificate(authority: Authority, mesh: str) -> Access:
    """Trusts the CA, shows nothing."""
    return Access(ca_file=authority.ca_file, server_name=mesh_dns(mesh))


def plaintext(authority: Authority, mesh: str) -> Access:
    """Does not even try."""
    return PLAIN


def trusting_another_ca(authority: Authority, mesh: str) -> Access:
    """All is well but the CA it trusts."""
    other = Authority(authority.folder / "other")
    return replace(authority.of_mesh(mesh).access(mesh_dns(mesh)), ca_file=other.ca_file)


@pytest.mark.parametrize(
    "stranger", [of_another_ca, expired, without_certificate, plaintext, trusting_another_ca]
)
async def test_strangers_do_not_reach_a_replica(
    secured: Secured, authority: Authority, stranger: Callable[[Authority, str], Access]
) -> None:
    with pytest.raises(Unavailable):
        await describe(secured.replica, stranger(authority, secured.mesh.name))
    own = secured.pair.access(mesh_dns(secured.mesh.name))
    assert (await describe(secured.replica, own)).replica == "g0#1"


@pytest.mark.parametrize("uri", [mesh_uri("another"), "https://example.com", None])
async def test_a_certificate_without_the_meshs_identity_is_refused_with_a_reason(
    secured: Secured, authority: Authority, uri: str | None
) -> None:
    pair = authority.pair("a user", uris=[uri] if uri else [], dns=["user.example.com"])
    access = pair.access(mesh_dns(secured.mesh.name))
    with pytest.raises(PermissionDenied, match=mesh_uri(secured.mesh.name)):
        await describe(secured.replica, access)
    async with connect(secured.replica.address, access=access) as channel:
        stream: Any = channel.stream_stream("/expertmesh.v1.ExpertService/ComputeStream")()
        with pytest.raises(grpc.RpcError) as refused:
            await stream.read()
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_router_gives_rows_to_no_impostor(
    secured: Secured, authority: Authority, checkpoint: MakeCheckpoint
) -> None:
    """Its certificate is of the right CA, and its heartbeat is perfect: it wrote to Redis."""
    pair = authority.pair("impostor", dns=[mesh_dns("another")])
    credentials = grpc.ssl_server_credentials([pair.content()])
    asked = []

    async def steal(request: Any, context: Any) -> None:
        asked.append(await context.read())

    handler: Any = grpc.stream_stream_rpc_method_handler(steal)
    generic = grpc.method_handlers_generic_handler(
        "expertmesh.v1.ExpertService", {"ComputeStream": handler}
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((generic,))
    port = server.add_secure_port(f"{HOST}:0", credentials)
    await server.start()
    state = secured.replica.state()
    state.incarnation, state.lease_ms, state.sequence = time.time_ns(), 60_000, 1 << 60
    state.address = f"{HOST}:{port}"
    secured.router.core.on_state(state)
    with pytest.raises(ExpertUnavailable):
        await secured.router.core.dispatch(
            0,
            torch.randn(1, HIDDEN),
            torch.tensor([[0]]),
            torch.ones(1, 1),
            "slot_sum",
            5.0,
        )
    await server.stop(None)
    assert asked == []


async def test_client_auth_asks_callers_of_a_router(
    mesh: Mesh, checkpoint: MakeCheckpoint, authority: Authority
) -> None:
    pair = authority.of_mesh(mesh.name)
    tls = pair.tls(client_auth="required")
    router = await mesh.router(
        checkpoint("mixtral"), complete=False, security=SecuritySettings(tls=tls)
    )
    user = authority.pair("a user", dns=["user.example.com"])
    assert await models(router.target, user.access(PUBLIC_NAME))
    with pytest.raises(Unavailable):
        await models(router.target, Access(ca_file=pair.ca_file))


async def test_a_new_certificate_needs_no_restart(
    secured: Secured, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = secured.router.target
    access = Access(ca_file=secured.pair.ca_file, server_name="new.example.com")
    with pytest.raises(Unavailable, match="Hostname"):
        await models(target, access)
    name = secured.mesh.name
    names = [mesh_dns(name), "new.example.com"]
    secured.pair.replaced_by(authority.pair("renewed", uris=[mesh_uri(name)], dns=names))
    await asyncio.sleep(watched.RECHECK_S)
    assert await models(target, access)
    # the old name is gone, and the router's own certificate to replicas is the new one as well
    with pytest.raises(Unavailable, match="Hostname"):
        await models(target, Access(ca_file=secured.pair.ca_file, server_name=PUBLIC_NAME))


async def test_a_broken_certificate_leaves_the_old_one(
    secured: Secured, caplog: pytest.LogCaptureFixture
) -> None:
    access = Access(ca_file=secured.pair.ca_file, server_name=PUBLIC_NAME)
    secured.pair.spoil_key("-----BEGIN PRIVATE KEY-----\nsecret\n")
    await asyncio.sleep(watched.RECHECK_S)
    assert await models(secured.router.target, access)
    assert "security.tls.key_file: expected a private key in PEM" in caplog.text
    assert "secret" not in caplog.text
