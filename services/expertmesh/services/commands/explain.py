"""`expertmesh explain`: why the rows of a token would go where they go."""

import argparse

from expertmesh.runtime.errors import InvalidInput
from expertmesh.services.commands.common import (
    DEFAULT_ROUTER,
    Subparsers,
    access_from,
    add_access,
)


def add(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("explain", help="why experts and replicas are chosen")
    parser.add_argument("--target", default=DEFAULT_ROUTER, help="router, host:port")
    parser.add_argument("--layer", type=int, default=0, help="index of the decoder layer")
    parser.add_argument("--seed", type=int, default=0, help="of the random token that is asked for")
    parser.add_argument("--quality-budget", type=float, default=0.0, metavar="SHARE")
    parser.add_argument("--policy", default="budget", help="budget, cache_prior or max_rank")
    parser.add_argument("--top-k", type=int, default=0, help="experts per token")
    parser.add_argument("--max-groups", type=int, default=0, help="expert groups per token")
    add_access(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask for a random token and print what spoke for which expert and replica."""
    import torch
    from rich.console import Console

    from expertmesh.client.router import RouterClient
    from expertmesh.runtime.tensors import torch_dtype
    from expertmesh.services.explanation import tables
    from expertmesh.v1 import router_pb2

    for name in ("top_k", "max_groups"):
        if getattr(args, name) < 0:
            raise InvalidInput.of(f"--{name}", expected="0 or more", got=getattr(args, name))
    selection = router_pb2.SelectionOptions(
        quality_budget=args.quality_budget,
        policy=args.policy,
        top_k=args.top_k,
        max_groups=args.max_groups,
    )
    with RouterClient(args.target, access=access_from(args)) as client:
        [model] = client.models()
        random = torch.Generator().manual_seed(args.seed)
        hidden_1D = torch.randn(1, model.hidden_size, generator=random)
        hidden_1D = hidden_1D.to(torch_dtype(model.dtype))
        answer = client.explain(args.layer, hidden_1D, selection)
    for table in tables(answer.tokens[0]):
        Console().print(table)
    return 0
