"""`expertmesh k8s`: what a RayService needs to know of a mesh."""

import argparse
import os
from pathlib import Path
from typing import get_args

from expertmesh.runtime.errors import ConfigError
from expertmesh.services.commands.common import Subparsers, add_settings, settings_from
from expertmesh.services.commands.plan import add_load
from expertmesh.services.settings import Dtype


def add(subparsers: Subparsers) -> None:
    """Declare the commands."""
    parser = subparsers.add_parser("k8s", help="manifests for Kubernetes")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_render(commands)
    _add_serve_config(commands)
    _add_drain(commands)


def _add_render(commands: Subparsers) -> None:
    parser = commands.add_parser("render", help="write an overlay sized for a model and its GPUs")
    parser.add_argument("model_dir", help="checkpoint; its headers are read")
    parser.add_argument("--gpus", required=True, help='what there is, like "a100-80gx1,l4x4"')
    parser.add_argument("--gpu", action="append", default=[], help="a GPU that is not known")
    parser.add_argument("--out", type=Path, help="directory; default k8s/overlays/MODEL")
    parser.add_argument("--base", type=Path, default=Path("k8s/base"), help="the base's directory")
    parser.add_argument("--dtype", default="auto", choices=get_args(Dtype), help="of the experts")
    add_load(parser)
    parser.set_defaults(run=_render)


def _render(args: argparse.Namespace) -> int:
    from expertmesh.services.gpus import parse_gpus, parse_own
    from expertmesh.services.k8s.render import Request, render
    from expertmesh.services.k8s.report import lines_of

    gpus = parse_gpus(args.gpus, parse_own(args.gpu))
    out = args.out or args.base.parent / "overlays" / Path(args.model_dir).resolve().name
    asked = Request(
        args.model_dir, gpus, args.base, out, args.dtype, args.batch_tokens, args.popularity
    )
    for line in lines_of(render(asked)):
        print(line)
    return 0


def _add_serve_config(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "serve-config", help="print the serveConfigV2 of a RayService for a configuration"
    )
    parser.add_argument(
        "checkpoint", nargs="?", help="where `model` lies on this machine, if not where it says"
    )
    parser.add_argument("--num-experts", type=int, help="of a layer, instead of a checkpoint")
    add_settings(parser)
    parser.set_defaults(run=_serve_config)


def _serve_config(args: argparse.Namespace) -> int:
    from expertmesh.services.ray_service import plan_for, serve_config_of

    settings = settings_from(args)
    num_experts = args.num_experts
    if num_experts is None:
        num_experts = plan_for(settings, args.checkpoint or settings.model).num_experts
    print(serve_config_of(settings, num_experts), end="")
    return 0


def _add_drain(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "drain", help="move the replicas of this Ray node elsewhere; a Pod's preStop"
    )
    parser.add_argument("--address", help="Ray's head; default $RAY_ADDRESS")
    parser.add_argument("--host", help="this node, as Ray knows it; default its own address")
    parser.add_argument("--ports", required=True, help="experts.ports")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS")
    parser.set_defaults(run=_drain)


def _drain(args: argparse.Namespace) -> int:
    address = args.address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise ConfigError.of("--address", expected="Ray's head, host:port", got="none")
    from expertmesh.services.ray_drain import drain_node, node_address

    took_s = drain_node(address, args.host or node_address(), args.ports, args.timeout)
    print(f"drained in {took_s:.1f} s")
    return 0
