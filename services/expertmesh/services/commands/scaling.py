"""`expertmesh scaling`: how many replicas each group should have, and why."""

import argparse

from expertmesh.services.commands.common import DEFAULT_ROUTER, Subparsers, access_from, add_access


def add(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("scaling", help="how many replicas each group should have")
    parser.add_argument("--target", default=DEFAULT_ROUTER, help="router or gateway, host:port")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    add_access(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the newest decisions."""
    from google.protobuf.json_format import MessageToJson
    from rich.console import Console

    from expertmesh.services.scaling_view import table
    from expertmesh.services.status import MeshView

    with MeshView(args.target, access_from(args)) as view:
        decisions = view.scaling()
    if args.json:
        print(MessageToJson(decisions, preserving_proto_field_name=True))
    elif decisions.groups:
        Console().print(table(decisions))
    else:
        print("no group is scaled: experts.scaling.mode is off")
    return 0
