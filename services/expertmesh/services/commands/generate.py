"""`expertmesh generate PROMPT`: text from a running gateway, as it comes."""

import argparse
import sys

from expertmesh.runtime.missing_experts import POLICIES
from expertmesh.services.commands.common import (
    DEFAULT_GATEWAY,
    Subparsers,
    access_from,
    add_access,
)


def add(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("generate", help="stream text from a running gateway")
    parser.add_argument("prompt")
    parser.add_argument("--target", default=DEFAULT_GATEWAY, help="gateway, host:port")
    parser.add_argument("--max-new-tokens", type=int, default=0, help="0: the model's default")
    parser.add_argument("--temperature", type=float, help="sample at this temperature")
    parser.add_argument("--top-p", type=float, help="sample from the most likely p")
    parser.add_argument("--top-k", type=int, help="sample from the k most likely")
    parser.add_argument("--seed", type=int, help="seed of the draws (exact engine)")
    parser.add_argument("--stop", action="append", default=[], help="end before this string")
    parser.add_argument(
        "--missing-experts",
        choices=POLICIES,
        help="what to do when experts have no live replica; default: as the gateway is configured",
    )
    add_access(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print pieces of text as they arrive, and at the end what missing experts have cost."""
    from expertmesh.client import Client

    largest = mean = 0.0
    with Client(args.target, access_from(args)) as client:
        for chunk in client.generate(
            args.prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            seed=args.seed,
            stop=args.stop,
            missing_experts=args.missing_experts,
        ):
            print(chunk.text, end="", flush=True)
            largest, mean = chunk.degraded_mass, chunk.mean_degraded_mass
    print()
    if largest:
        print(
            f"degraded: experts were missing, with up to {largest:.1%} of a token's weights in a "
            f"layer, {mean:.2%} on average",
            file=sys.stderr,
        )
    return 0
