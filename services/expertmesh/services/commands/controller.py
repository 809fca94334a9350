"""`expertmesh controller`: plans where copies of experts should be, and moves them if it may."""

import argparse

from expertmesh.runtime.errors import ConfigError
from expertmesh.services.commands.common import Subparsers, add_settings, settings_from


def add(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("controller", help="run the mesh's controller against a Redis")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM."""
    settings = settings_from(args)
    if settings.redis.url is None:
        raise ConfigError("redis.url: a controller needs the mesh's Redis", field="redis.url")
    from expertmesh.services.controller.process import run_controller

    run_controller(settings, settings.redis.url)
    return 0
