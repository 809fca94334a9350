"""`expertmesh router`: the router process alone, as Kubernetes and `serve` run it."""

import argparse

from expertmesh.runtime.errors import ConfigError
from expertmesh.services.commands.common import Subparsers, add_settings, settings_from


def add(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("router", help="run one router process against a Redis")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM."""
    settings = settings_from(args)
    if settings.redis.url is None:
        raise ConfigError("redis.url: a router of its own needs a Redis", field="redis.url")
    from expertmesh.runtime.imports import collector_paused

    with collector_paused():
        from expertmesh.services.router import run_router

    run_router(settings, settings.redis.url)
    return 0
