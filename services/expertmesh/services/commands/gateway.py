"""`expertmesh gateway`: the gateway process alone, without Ray, as Kubernetes runs it."""

import argparse

from expertmesh.runtime.errors import ConfigError
from expertmesh.services.commands.common import Subparsers, add_settings, settings_from


def add(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("gateway", help="run one gateway process against a Redis")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM."""
    settings = settings_from(args)
    if settings.redis.url is None:
        raise ConfigError("redis.url: a gateway of its own needs a Redis", field="redis.url")
    from expertmesh.runtime.imports import collector_paused

    with collector_paused():
        from expertmesh.services.gateway.process import run_gateway

    run_gateway(settings, settings.redis.url)
    return 0
