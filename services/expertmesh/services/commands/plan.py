"""`expertmesh plan MODEL_DIR --gpus a100x2,l4x6`: which GPU would hold what, on paper.

`expertmesh plan --live`: what the controller of a running mesh thinks.
"""

import argparse
import json
from pathlib import Path
from typing import get_args

from expertmesh.services.commands.common import (
    DEFAULT_CONTROLLER,
    Subparsers,
    access_from,
    add_access,
)
from expertmesh.services.settings import Dtype

DEFAULT_BATCH_TOKENS = 256


def add(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("plan", help="place experts on GPUs, on paper; loads nothing")
    parser.add_argument("model_dir", nargs="?")
    parser.add_argument("--gpus", help='what there is, like "a100x2,l4x6"')
    parser.add_argument(
        "--gpu",
        action="append",
        default=[],
        metavar="NAME=GB,GB_PER_S,TFLOPS",
        help="a GPU that is not known: memory, bandwidth, 16 bit rate; may be repeated",
    )
    add_load(parser)
    parser.add_argument(
        "--prices", type=Path, help="YAML of the price of an hour of each GPU, like `a100: 1.80`"
    )
    parser.add_argument("--dtype", default="auto", choices=get_args(Dtype), help="of the experts")
    parser.add_argument(
        "--tokens-per-s", type=float, help="measured, for the cost; else the data sheets' best"
    )
    parser.add_argument(
        "--live", action="store_true", help="the newest plan of a running mesh's controller"
    )
    parser.add_argument(
        "--target", default=DEFAULT_CONTROLLER, help="for --live: the controller, host:port"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    add_access(parser)
    parser.set_defaults(run=run)


def add_load(parser: argparse.ArgumentParser) -> None:
    """Declare what a plan assumes of the load."""
    parser.add_argument(
        "--popularity", type=Path, help="CSV of layer,expert,rows, as `status --usage` prints it"
    )
    parser.add_argument(
        "--batch-tokens",
        type=_positive,
        default=DEFAULT_BATCH_TOKENS,
        help="tokens that go through a layer together",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    return _live(args) if args.live else _on_paper(args)


def _live(args: argparse.Namespace) -> int:
    from google.protobuf.json_format import MessageToJson

    from expertmesh.services.planning.live import read_plan, render_plan

    plan = read_plan(args.target, access_from(args))
    if args.json:
        print(MessageToJson(plan, preserving_proto_field_name=True))
    else:
        render_plan(plan)
    return 0


def _on_paper(args: argparse.Namespace) -> int:
    from expertmesh.runtime.errors import ConfigError
    from expertmesh.services.gpus import parse_gpus, parse_own
    from expertmesh.services.planning.paper import plan_on_paper
    from expertmesh.services.planning.popularity import read_popularity, read_prices
    from expertmesh.services.planning.report import as_dict, read_model, render

    if args.model_dir is None or args.gpus is None:
        raise ConfigError("plan: expected a model directory and --gpus, or --live", field="plan")
    if args.tokens_per_s is not None and not args.tokens_per_s > 0:
        raise ConfigError.of("--tokens-per-s", expected="above 0", got=args.tokens_per_s)
    gpus = parse_gpus(args.gpus, parse_own(args.gpu))
    prices = read_prices(args.prices) if args.prices else None
    model = read_model(args.model_dir, args.dtype)
    popularity = read_popularity(args.popularity, model.num_experts) if args.popularity else None
    plan = plan_on_paper(
        model,
        gpus,
        popularity,
        batch_tokens=args.batch_tokens,
        prices=prices,
        measured_tokens_per_s=args.tokens_per_s,
    )
    if args.json:
        print(json.dumps(as_dict(plan), indent=2))
    else:
        render(plan)
    return 0
