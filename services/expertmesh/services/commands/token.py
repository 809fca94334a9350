"""`expertmesh token NAME`: a new bearer token, and its entry for the file of tokens."""

import argparse
import sys

from expertmesh.services.commands.common import Subparsers


def add(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("token", help="make a bearer token")
    parser.add_argument("name", help="who will have it")
    parser.add_argument(
        "--scopes",
        nargs="+",
        default=["generate"],
        choices=["route", "generate", "control"],
        help="what it may call (default: generate)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The token to stdout, its entry to stderr: the one for its owner, the other for the server."""
    from expertmesh.runtime.config import validate
    from expertmesh.runtime.security.tokens import TokenEntry, new_token, token_hash

    token = new_token()
    entry = {"name": args.name, "sha256": token_hash(token), "scopes": args.scopes}
    checked = validate(TokenEntry, entry)
    print(token)
    scopes = ", ".join(args.scopes)
    print("put this under `tokens:` in the file of security.tokens_file:", file=sys.stderr)
    print(f"- name: {checked.name}", file=sys.stderr)
    print(f"  sha256: {checked.sha256}", file=sys.stderr)
    print(f"  scopes: [{scopes}]", file=sys.stderr)
    return 0
