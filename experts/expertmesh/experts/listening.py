"""Where a replica listens, and whom it lets in."""

from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.ports import parse_ports
from expertmesh.runtime.security.guard import ReplicaGuard
from expertmesh.runtime.security.server import ServerSecurity
from expertmesh.runtime.server import MeshServer


def security_of(args: ExpertGroupArgs) -> ServerSecurity:
    """With a certificate, only processes with the mesh's identity may call."""
    return ServerSecurity(
        args.tls,
        args.mesh,
        requires_certificate=True,
        guard=ReplicaGuard(args.mesh) if args.tls.enabled else None,
        insecure=args.insecure,
    )


async def listen(server: MeshServer, host: str, ports: str) -> int:
    """The port it listens on: the first of `ports` that nobody on this address uses.

    Raises:
        ConfigError: all are taken, or the address is not ours.
    """
    for port in parse_ports(ports):
        try:
            return await server.start(host, port)
        except ConfigError as error:
            if error.fields.get("field") != "port":
                raise
    raise ConfigError.of(
        "experts.ports",
        expected="a port that is free",
        got=f"{ports or 'none'} on {host}",
        hint="Every replica on an address takes one, so widen the range.",
    )


def node_address() -> str:
    """Of this node, as Ray knows it."""
    import ray

    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
