"""`expertmesh`: serve the experts of Mixture-of-Experts models as microservices."""

import argparse
import asyncio
import sys
from importlib.metadata import version

from expertmesh.runtime.errors import ExpertMeshError
from expertmesh.services.commands import (
    controller,
    demo,
    explain,
    gateway,
    generate,
    inspect,
    k8s,
    parity,
    plan,
    router,
    scale,
    scaling,
    serve,
    simulate,
    status,
    token,
)

COMMANDS = (
    serve,
    demo,
    generate,
    inspect,
    plan,
    simulate,
    status,
    scaling,
    scale,
    explain,
    parity,
    router,
    gateway,
    controller,
    token,
    k8s,
)
USER_ERROR = 2
INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="expertmesh", description=__doc__)
    top.add_argument("--version", action="version", version=version("expertmesh"))
    subparsers = top.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(subparsers)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; an expected error is one line on stderr and exit code 2."""
    args = parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except ExpertMeshError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return USER_ERROR
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
