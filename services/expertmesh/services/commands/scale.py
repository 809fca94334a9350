"""`expertmesh scale`: set the number of replicas of a group by hand, for a time."""

import argparse

from expertmesh.runtime.errors import InvalidInput
from expertmesh.services.commands.common import DEFAULT_ROUTER, Subparsers, access_from, add_access
from expertmesh.services.durations import parse_duration


def add(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("scale", help="set a group's replicas by hand, for a time")
    parser.add_argument("group", help="expert group, like g0")
    parser.add_argument("replicas", nargs="?", type=int, help="how many, within the rule's bounds")
    parser.add_argument(
        "--for", dest="duration", default="10m", metavar="TIME", help="90s, 10m, 2h, 1d; 10m"
    )
    parser.add_argument("--auto", action="store_true", help="let the rule decide again")
    parser.add_argument("--target", default=DEFAULT_ROUTER, help="router or gateway, host:port")
    add_access(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Set the number, or take it back."""
    from expertmesh.services.status import MeshView

    if args.auto == (args.replicas is not None):
        got = f"{args.replicas} and --auto" if args.auto else "neither"
        raise InvalidInput.of("replicas", expected="a number or --auto", got=got)
    if not args.auto and args.replicas < 0:
        raise InvalidInput.of("replicas", expected="0 or more", got=args.replicas)
    for_s = parse_duration(args.duration, "--for")
    with MeshView(args.target, access_from(args)) as view:
        if not args.auto:
            view.set_replicas(args.group, args.replicas, for_s)
            print(f"{args.group}: {args.replicas} replicas for {args.duration}")
        elif view.release_replicas(args.group):
            print(f"{args.group}: the rule decides again")
        else:
            print(f"{args.group}: nothing was set by hand")
    return 0
