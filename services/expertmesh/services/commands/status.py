"""`expertmesh status`: the mesh as a router or gateway sees it, live."""

import argparse
import asyncio
import time

from expertmesh.services.commands.common import (
    DEFAULT_ROUTER,
    Subparsers,
    access_from,
    add_access,
)

REFRESH_S = 0.5


def add(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("status", help="live table of replicas, memory and load")
    parser.add_argument("--target", default=DEFAULT_ROUTER, help="router or gateway, host:port")
    parser.add_argument("--once", action="store_true", help="print once and exit")
    parser.add_argument("--json", action="store_true", help="print once, machine-readable")
    parser.add_argument(
        "--usage", action="store_true", help="print rows routed to each expert, as CSV for `plan`"
    )
    parser.add_argument(
        "--wait", type=float, metavar="SECONDS", help="first wait until the target is serving"
    )
    add_access(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table, again and again unless --once or --json."""
    from google.protobuf.json_format import MessageToJson
    from rich.console import Console
    from rich.live import Live

    from expertmesh.services.health import wait_serving
    from expertmesh.services.planning.popularity import usage_csv
    from expertmesh.services.status import MeshView, table

    access = access_from(args)
    if args.wait:
        asyncio.run(wait_serving(args.target, args.wait, access=access))
    with MeshView(args.target, access) as view:
        if args.usage:
            print(usage_csv(view.usage()))
        elif args.json:
            print(MessageToJson(view.read(), preserving_proto_field_name=True))
        elif args.once:
            Console().print(table(view.read()))
        else:
            with Live(table(view.read()), refresh_per_second=1 / REFRESH_S) as live:
                while True:
                    time.sleep(REFRESH_S)
                    live.update(table(view.read()))
    return 0
