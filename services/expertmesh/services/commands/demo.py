"""`expertmesh demo`: serve the demo model, show what its experts do, compare with transformers."""

import argparse

from expertmesh.services.commands.common import Subparsers, add_settings, add_token_file

DEFAULT_MODEL = "examples/demo-moe"


def add(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("demo", help="the demo model, served, used and checked")
    parser.add_argument("model_dir", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--keep", action="store_true", help="leave the mesh up until Ctrl-C")
    add_settings(parser)
    add_token_file(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0 only if logits and tokens equal transformers'."""
    import asyncio

    from expertmesh.services.commands.common import progress_printer, settings_from
    from expertmesh.services.demo import run_demo

    free_ports = {"router.port": 0, "gateway.port": 0}
    settings = settings_from(args, model=args.model_dir, **({} if args.keep else free_ports))
    demo = run_demo(settings, progress_printer(), keep=args.keep, token_file=args.token_file)
    return asyncio.run(demo)
