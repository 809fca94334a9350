"""`expertmesh inspect MODEL_DIR`: what a checkpoint is and what would fit where; loads nothing."""

import argparse
import dataclasses
import json
from typing import get_args

from expertmesh.services.commands.common import Subparsers
from expertmesh.services.settings import Dtype


def add(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("inspect", help="describe a checkpoint without loading it")
    parser.add_argument("model_dir")
    parser.add_argument("--groups", type=int, default=4, help="expert groups to size")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=get_args(Dtype),
        help="dtype the experts would be held in",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from expertmesh.services.inspection import inspect_model, render

    report = inspect_model(args.model_dir, args.groups, args.dtype)
    if args.json:
        print(json.dumps(dataclasses.asdict(report), indent=2, default=str))
    else:
        render(report)
    return 0
