"""`expertmesh parity MODEL_DIR`: serve any checkpoint and compare it with transformers."""

import argparse

from expertmesh.services.commands.common import Subparsers, add_settings, add_token_file


def add(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("parity", help="compare a served checkpoint with transformers")
    parser.add_argument("model_dir")
    add_settings(parser)
    add_token_file(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0 only if every comparison is equal."""
    import asyncio

    from expertmesh.services.commands.common import progress_printer, settings_from
    from expertmesh.services.parity import run_parity

    free_ports = {"router.port": 0, "gateway.port": 0}
    settings = settings_from(args, model=args.model_dir, **free_ports)
    return asyncio.run(run_parity(settings, progress_printer(), args.token_file))
