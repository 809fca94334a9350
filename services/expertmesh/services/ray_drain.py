"""A Ray node that is about to go: its replicas move elsewhere before it does.

`ray stop` and SIGTERM take the replicas along as they stand. This asks Ray to drain the node, as
its autoscaler does: Serve starts successors on other nodes and then stops these, each of which
finishes its rows. The calls are those of the hidden `ray drain-node`.
"""

import importlib
import socket
import time
from typing import Any

from expertmesh.runtime.errors import Unavailable
from expertmesh.runtime.ports import parse_ports

_POLL_S = 0.5
_CONNECT_TIMEOUT_S = 0.2
_GCS_TIMEOUT_S = 5.0
_REASON = "the Pod is being deleted"


def drain_node(address: str, host: str, ports: str, timeout_s: float) -> float:
    """Ask Ray to drain this node and wait until no replica listens on it; seconds it took.

    Args:
        address: Ray's head, "host:port".
        host: this node, as Ray knows it; replicas listen there.
        ports: `experts.ports`.

    Raises:
        Unavailable: Ray does not know the node or refuses, or replicas are left after `timeout_s`.
    """
    started_s = time.monotonic()
    _ask(address, host, timeout_s)
    while listening := [port for port in parse_ports(ports) if _listens(host, port)]:
        if time.monotonic() - started_s > timeout_s:
            raise Unavailable(f"{host}: replicas on {listening} are left after {timeout_s:g} s")
        time.sleep(_POLL_S)
    return time.monotonic() - started_s


def node_address() -> str:
    """This node's address, found as Ray finds it."""
    import ray

    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _ask(address: str, host: str, timeout_s: float) -> None:
    raylet: Any = importlib.import_module("ray._raylet")  # it has no types
    generated: Any = importlib.import_module("ray.core.generated.gcs_pb2")
    gcs = raylet.GcsClient(address=address)
    nodes = gcs.get_all_node_info(timeout=_GCS_TIMEOUT_S)
    alive = generated.GcsNodeInfo.ALIVE
    own = [
        node_id.hex()
        for node_id, info in nodes.items()
        if info.node_manager_address == host and info.state == alive
    ]
    if len(own) != 1:
        raise Unavailable(f"{address}: expected one Ray node at {host}, got {len(own)}")
    deadline_ms = time.time_ns() // 10**6 + round(timeout_s * 1000)
    accepted, why = gcs.drain_node(own[0], _preemption(), _REASON, deadline_ms)
    if not accepted:
        raise Unavailable(f"{host}: Ray does not drain it: {why}")


def _preemption() -> int:
    generated: Any = importlib.import_module("ray.core.generated.autoscaler_pb2")
    return int(generated.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"))


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), _CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True
