"""One bridge; a network namespace with an address for each Pod."""

import subprocess
from itertools import count

from tests.e2e.rehearsal.outside import STATE

NODE = "10.77.0.1"
"""The bridge: where the kubelet probes from, and where API server and DNS listen."""
_numbers = count(10)


def ip(*args: str) -> None:
    """One `ip` command; raises if it fails."""
    done = subprocess.run(["ip", *args], capture_output=True, text=True)
    assert not done.returncode, f"ip {' '.join(args)}: {done.stderr}"


def open_bridge() -> None:
    """Once, before any Pod."""
    ip("link", "set", "lo", "up")
    ip("link", "add", "br0", "type", "bridge")
    ip("address", "add", f"{NODE}/16", "dev", "br0")
    ip("link", "set", "br0", "up")


def add_namespace() -> tuple[str, str]:
    """A new one: (name, address)."""
    number = next(_numbers)
    name, address, veth = f"pod{number}", f"10.77.{number // 250}.{number % 250}", f"veth{number}"
    ip("netns", "add", name)
    ip("link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", name)
    ip("link", "set", veth, "master", "br0", "up")
    for args in (
        ("address", "add", f"{address}/16", "dev", "eth0"),
        ("link", "set", "eth0", "up"),
        ("link", "set", "lo", "up"),
        ("route", "add", "default", "via", NODE),
    ):
        ip("-n", name, *args)
    return name, address


def delete_namespace(name: str) -> None:
    """With its interface: addresses of dead Pods do not answer, not even with a reset."""
    ip("link", "delete", name.replace("pod", "veth"))
    ip("netns", "delete", name)


def write_etc(name: str, address: str, hostname: str, namespace: str) -> None:
    """hosts and resolv.conf, as a kubelet writes them."""
    folder = STATE / "pods" / name / "etc"
    folder.mkdir(parents=True)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {hostname}\n")
    domains = f"{namespace}.svc.cluster.local svc.cluster.local cluster.local"
    (folder / "resolv.conf").write_text(f"search {domains}\nnameserver {NODE}\noptions ndots:5\n")
