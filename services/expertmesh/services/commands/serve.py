"""`expertmesh serve MODEL_DIR`: the whole mesh on this machine, until interrupted."""

import argparse
import asyncio

from expertmesh.services.commands.common import (
    Subparsers,
    add_settings,
    progress_printer,
    settings_from,
)
from expertmesh.services.settings import MeshSettings


def add(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "serve", help="serve a checkpoint with everything on this machine"
    )
    parser.add_argument("model_dir", nargs="?", help="Hugging Face checkpoint directory")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Start, print the endpoints, wait for SIGINT or SIGTERM, stop."""
    asyncio.run(_serve(settings_from(args, model=args.model_dir)))
    return 0


async def _serve(settings: MeshSettings) -> None:
    from expertmesh.services.local import local_mesh
    from expertmesh.services.signals import forever

    progress = progress_printer()
    async with local_mesh(settings, progress) as endpoints:
        print(f"model    {endpoints.model}")
        print(f"gateway  {endpoints.gateway}   GenerateService, ControlService")
        print(f"router   {endpoints.router}   RouterService, ControlService")
        print(f"redis    {endpoints.redis_url}", flush=True)
        await forever()
    progress("stopped")
