"""The processes of an overlay with components/tls, each with the files where its Pod has them.

`python -m tests.k8s.tls_world FOLDER`, inside of `unshare --mount --net`: mounts
FOLDER/mounts/NAME where the manifests do, FOLDER/hosts as the cluster's DNS, and lets all Pods
share one address. Prints a line of JSON for each thing it has seen. Replicas run without Ray, from
the arguments in the RayService's serveConfigV2; commands, ports, names and paths are the
manifests'.
"""

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from tests.waiting import until

from expertmesh.client import AsyncClient
from expertmesh.client.failures import error_of
from expertmesh.client.generate import request_of
from expertmesh.runtime.channels import connect
from expertmesh.runtime.errors import ExpertMeshError, Unavailable
from expertmesh.runtime.redis_server import find_server
from expertmesh.runtime.security.access import PLAIN, Access
from expertmesh.runtime.security.identity import mesh_dns
from expertmesh.v1 import expert_pb2

ADDRESS = "10.77.0.1"
"""Of the only interface: all Pods listen there."""
REPLICA_PORT = 20000
GATEWAY = "gateway.expertmesh:50052"
ROUTER = "router.expertmesh:50051"
TLS = "/etc/expertmesh/tls"
MODEL = "/opt/expertmesh/demo-moe"


def lay_out(folder: Path) -> None:
    """Mounts, names and the address, for this process and its children only."""
    plan: dict[str, str] = json.loads((folder / "plan.json").read_text())["mounts"]
    for root in ("/etc", "/opt"):
        upper, work = folder / f"upper{root}", folder / f"work{root}"
        for path in (upper, work):
            path.mkdir(parents=True)
        for target in plan.values():
            if target.startswith(f"{root}/"):
                (folder / f"upper{target}").mkdir(parents=True, exist_ok=True)
        layers = f"lowerdir={root},upperdir={upper},workdir={work}"
        run("mount", "-t", "overlay", "overlay", "-o", layers, root)
    for source, target in plan.items():
        run("mount", "--bind", source, target)
    run("mount", "--bind", str(folder / "hosts"), "/etc/hosts")
    run("ip", "link", "set", "lo", "up")
    run("ip", "address", "add", f"{ADDRESS}/32", "dev", "lo")


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


@asynccontextmanager
async def process(*command: str, log: Path, stdin: bytes = b"") -> AsyncIterator[Any]:
    """Ended with SIGTERM."""
    with log.open("wb") as out:
        child = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=out, stderr=out
        )
    assert child.stdin
    child.stdin.write(stdin)
    child.stdin.close()
    try:
        yield child
    finally:
        if child.returncode is None:
            child.terminate()
        await child.wait()


def replicas(folder: Path, tag: str) -> Any:
    """All groups of the RayService in one process; its log says when they serve."""
    command = [sys.executable, "-m", "tests.k8s.tls_replicas", str(folder / "serve.json"), tag]
    return process(*command, ADDRESS, log=folder / f"{tag}.log")


def command(args: list[str], folder: Path) -> Any:
    """`expertmesh ARGS`, as the image's entry point runs them."""
    module = [sys.executable, "-m", "expertmesh.services.cli"]
    return process(*module, *args, log=folder / f"{args[0]}.log")


def tell(what: str, **more: object) -> None:
    """To the test."""
    print(json.dumps({"what": what, **more}), flush=True)  # noqa: T201


def user() -> Access:
    """A client: trusts the mesh's CA, shows nothing."""
    return Access(ca_file=f"{TLS}/ca.crt")


def member() -> Access:
    """A process of the mesh."""
    return Access(
        ca_file=f"{TLS}/ca.crt",
        cert_file=f"{TLS}/tls.crt",
        key_file=f"{TLS}/tls.key",
        server_name=mesh_dns("default"),
    )


async def generate(access: Access) -> list[int]:
    """A new connection and a few tokens."""
    async with AsyncClient(GATEWAY, access) as client:
        request = request_of("The ", max_new_tokens=8, ignore_eos=True)
        return [t async for chunk in client.generate(request, 20.0) for t in chunk.tokens]


async def until_served(children: list[Any]) -> list[int]:
    """The first answer."""
    async with asyncio.timeout(120):
        while True:
            ended = [child.returncode for child in children if child.returncode is not None]
            assert not ended, f"a process ended: {ended}"
            try:
                return await generate(user())
            except ExpertMeshError:
                await asyncio.sleep(0.2)


async def describe(access: Access, port: int = REPLICA_PORT) -> str:
    """Who a replica is, or the error."""
    async with connect(f"{ADDRESS}:{port}", access=access) as channel:
        call: Any = channel.unary_unary(
            "/expertmesh.v1.ExpertService/Describe",
            expert_pb2.DescribeRequest.SerializeToString,
            lambda reply: reply,
        )
        try:
            await call(expert_pb2.DescribeRequest(), timeout=5)
        except grpc.RpcError as failure:
            return type(error_of(failure)).__name__
        return "answers"


async def opens(target: str) -> bool:
    """What a TCP probe sees."""
    host, _, port = target.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    return True


def serial(port: int) -> str:
    """Of the certificate that a server shows now."""
    context = ssl.create_default_context(cafile=f"{TLS}/ca.crt")
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((ADDRESS, port), 5) as raw,
        context.wrap_socket(raw) as secured,
    ):
        shown = secured.getpeercert(binary_form=True)
    return str(x509.load_der_x509_certificate(shown or b"").serial_number)


class Caller:
    """Calls one after the other over one connection, until told to stop."""

    def __init__(self) -> None:
        self.answers: list[list[int]] = []
        self.errors: list[str] = []
        self._task = asyncio.create_task(self._call())
        self._stopping = False

    async def _call(self) -> None:
        async with AsyncClient(GATEWAY, user()) as client:
            while not self._stopping:
                request = request_of("The ", max_new_tokens=8, ignore_eos=True)
                try:
                    own = [t async for c in client.generate(request, 20.0) for t in c.tokens]
                except Unavailable as error:
                    self.errors.append(error.message)
                except ExpertMeshError as error:
                    self.errors.append(f"{type(error).__name__}: {error.message}")
                else:
                    self.answers.append(own)

    async def stop(self) -> None:
        self._stopping = True
        await self._task


def rotate(folder: Path) -> None:
    """As the kubelet does: a new folder, and `..data` is another link at once."""
    mounted = folder / "mounts/tls"
    (mounted / "..data_tmp").symlink_to("..renewed")
    os.replace(mounted / "..data_tmp", mounted / "..data")


async def until_shown(wanted: str, ports: list[int]) -> None:
    """That certificate by all of these ports."""
    for port in ports:
        async with asyncio.timeout(30):
            shown = ""
            while shown != wanted:
                shown = await asyncio.to_thread(serial, port)


async def main(folder: Path, plan: dict[str, Any], password: str) -> None:
    """Start, look, rotate under calls, replace the replicas under calls."""
    config = f"port 6379\nbind {ADDRESS}\nsave ''\nrequirepass {password}\n".encode()
    async with AsyncExitStack() as stack:
        redis = process(str(find_server().path), "-", log=folder / "redis.log", stdin=config)
        await stack.enter_async_context(redis)
        old = await stack.enter_async_context(replicas(folder, "old"))
        others = [await stack.enter_async_context(command(a, folder)) for a in plan["args"]]
        expected = await until_served([old, *others])
        tell("served", tokens=expected)
        ports = [50051, 50052, REPLICA_PORT]
        tell("shown", serials=[serial(port) for port in ports])
        tell("probes", open=[await opens(ROUTER), await opens(GATEWAY)])
        tell("replica", plaintext=await describe(PLAIN), user=await describe(user()))
        tell("replica", member=await describe(member()))
        caller = Caller()
        await until(lambda: len(caller.answers) > 1, deadline_s=30)
        rotate(folder)
        await until_shown(plan["renewed"], ports)
        tell("rotated", num_answers=len(caller.answers))
        async with replicas(folder, "new"):
            log = folder / "new.log"
            await until(lambda: "replicas serve" in log.read_text(), deadline_s=60)
            new_port = REPLICA_PORT + plan["num_groups"]
            await until_shown(plan["renewed"], [new_port])
            old.terminate()  # drains: routers have only the new ones then, by new connections
            await old.wait()
            seen = len(caller.answers)
            await until(lambda: len(caller.answers) > seen + 3, deadline_s=30)
            tell("served", tokens=await generate(user()))
            await caller.stop()
            same = all(own == expected for own in caller.answers)
            tell("calls", num=len(caller.answers), same=same, errors=caller.errors[:5])


if __name__ == "__main__":
    world = Path(sys.argv[1])
    lay_out(world)
    told = json.loads((world / "plan.json").read_text("utf-8"))
    secret = Path("/etc/expertmesh/redis/password").read_text("utf-8").strip()
    asyncio.run(main(world, told, secret))
