"""What several commands share: settings from file, environment and flags; addresses."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expertmesh.runtime.config import load, parse_value
from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.security.access import Access
from expertmesh.services.settings import MeshSettings

DEFAULT_ROUTER = "127.0.0.1:50051"
DEFAULT_GATEWAY = "127.0.0.1:50052"
DEFAULT_CONTROLLER = "127.0.0.1:50053"
Subparsers = Any  # argparse's _SubParsersAction is private


def add_settings(parser: argparse.ArgumentParser) -> None:
    """--config, --groups and --set."""
    parser.add_argument("--config", type=Path, help="YAML file; fields as in docs/configuration.md")
    parser.add_argument("--groups", type=int, help="expert groups (experts.groups)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one field, like --set experts.threads=2; may be repeated",
    )


def settings_from(args: argparse.Namespace, **overrides: Any) -> MeshSettings:
    """The mesh's settings: defaults, file, EXPERTMESH_* variables, flags.

    Raises:
        ConfigError: names the wrong field and where it came from.
    """
    values = {**overrides, "experts.groups": args.groups}
    for assignment in args.set:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: expected NAME=VALUE", field="--set")
        if name.rpartition(".")[2] == "password":
            message = (
                f"--set {name}: everybody on this machine sees it (ps); use a file or a variable"
            )
            raise ConfigError(message, field=name)
        values[name] = parse_value(text, f"--set {name}")
    if args.config and not args.config.is_file():
        raise ConfigError(f"--config {args.config}: no such file", field="--config")
    return load(MeshSettings, args.config, env=os.environ, overrides=values)


def add_token_file(parser: argparse.ArgumentParser) -> None:
    """--token-file."""
    parser.add_argument("--token-file", metavar="FILE", help="file with the bearer token")


def add_access(parser: argparse.ArgumentParser) -> None:
    """The --tls flags and --token-file, of every command that connects."""
    parser.add_argument("--tls", action="store_true", help="encrypt; trust the system's CAs")
    parser.add_argument("--tls-ca", metavar="FILE", help="encrypt; trust this CA (PEM)")
    parser.add_argument("--tls-cert", metavar="FILE", help="own certificate (PEM)")
    parser.add_argument("--tls-key", metavar="FILE", help="its private key (PEM)")
    parser.add_argument("--tls-server-name", metavar="NAME", help="name in the certificate there")
    add_token_file(parser)


def access_from(args: argparse.Namespace) -> Access:
    """What the flags of `add_access` say.

    Raises:
        ConfigError: a certificate without its key.
    """
    return Access(
        tls=args.tls,
        ca_file=args.tls_ca,
        cert_file=args.tls_cert,
        key_file=args.tls_key,
        server_name=args.tls_server_name,
        token_file=args.token_file,
    )


def progress_printer() -> Callable[[str], None]:
    """Prints each step with the seconds since the start."""
    started_s = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - started_s:5.1f} s] {text}", file=sys.stderr, flush=True)

    return progress
