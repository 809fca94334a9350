"""Our transport beside plain Ray Serve: the same experts in the same Ray session.

T tokens, D hidden size, K top-k, S rows (T * K).
"""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import plain_serve
from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.mesh import MODEL, event_loop, redis_server, router_core
from benchmarks.harness.report import Bar, Report
from benchmarks.harness.serve_proxy import proxied_groups, proxy_pids, ray_cluster_with_proxy
from benchmarks.harness.turns import ClosedLoop, Contestant, Turns, ratio, summary, take_turns
from expertmesh.experts.assignment import split_evenly
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.router import links
from expertmesh.router.combine import combine
from expertmesh.services.callers import CoreCaller
from expertmesh.services.ray_cluster import deploy, wait_running
from expertmesh.services.serve_config import EXPERTS_IMPORT_PATH, application
from expertmesh.v1 import router_pb2

GROUPS = 4
TOKENS = (1, 64)
OURS, OVER_GRPC = "ours", "ours over gRPC"
SHAPES = {
    "demo layer": MoeShape(hidden_size=128, ffn_size=256),
    "h=512 layer": MoeShape(hidden_size=512, ffn_size=1408),
}
_START_S = 120.0
_ABOUT = (
    f"8 experts, top-2, in {GROUPS} groups, float32, one caller. **ours**: expert groups deployed "
    "on Ray Serve, called past it, over Unix sockets. **ours over gRPC**: the same replicas, "
    "called as from another host. **handle**: the same experts in one plain deployment a group, "
    "called through DeploymentHandles with asyncio.gather from the driver, tensors by reference "
    "(what Serve documents) and by value (an option with an underscore). **gRPC proxy**: the very "
    "same deployments behind Serve's gRPC proxy, one application a group, called with unary calls "
    "of grpc.aio and asyncio.gather from the driver. CPU: the client, the replicas it calls and, "
    "where calls go through it, the proxy; Ray's own processes, which only the handles and the "
    "proxy use, are left out."
)

Call = Callable[[], torch.Tensor]
Ask = Callable[[list[int], list[int], torch.Tensor], Awaitable[torch.Tensor]]
"""Experts of a group, the number of rows of each, the rows; their outputs in the same order."""


@contextmanager
def _our_groups(paths: dict[str, Path], redis_url: str) -> Iterator[None]:
    groups = [
        ExpertGroupArgs(
            group=f"{name.split()[0]}-{number}".replace("=", ""),
            model_dir=str(path),
            model=MODEL,
            mesh=_mesh_of(name),
            experts=experts,
            redis_url=redis_url,
            host="127.0.0.1",
            lease_s=30,
            log_level="WARNING",
        )
        for name, path in paths.items()
        for number, experts in enumerate(split_evenly(8, GROUPS))
    ]
    applications = [application(own.group, EXPERTS_IMPORT_PATH, own, []) for own in groups]
    deploy({"proxy_location": "Disabled", "applications": applications})
    asyncio.run(wait_running([own.group for own in groups], _START_S, lambda text: None))
    yield


def _mesh_of(name: str) -> str:
    return name.split()[0].replace("=", "")


def _plain_names(name: str) -> list[str]:
    return [f"plain-{_mesh_of(name)}-{number}" for number in range(GROUPS)]


def _plain_handles(name: str, path: Path) -> list[Any]:
    """A handle for each group, the deployments running."""
    from ray import cloudpickle, serve

    cloudpickle.register_pickle_by_value(plain_serve)  # type: ignore[no-untyped-call]
    group: Any = serve.deployment(ray_actor_options={"num_cpus": 0})(plain_serve.PlainGroup)
    share = 8 // GROUPS
    return [
        serve.run(
            group.bind(str(path), list(range(number * share, (number + 1) * share))),
            name=application,
            route_prefix=f"/{application}",  # the proxy knows only applications that have one
        )
        for number, application in enumerate(_plain_names(name))
    ]


class _Routed:
    """One call's input, and what each group gets of it."""

    def __init__(self, tokens: int, hidden_size: int) -> None:
        random = torch.Generator().manual_seed(0)  # one token's experts are in two groups then
        self.experts_TK = torch.rand(tokens, 8, generator=random).topk(2).indices
        self.weights_TK = torch.rand(tokens, 2, generator=random)
        self.hidden_TD = torch.randn(tokens, hidden_size, generator=random)

    def ours(self, caller: CoreCaller) -> torch.Tensor:
        """Through the router core."""
        slot_sum = router_pb2.COMBINE_SLOT_SUM
        return caller.dispatch(0, self.hidden_TD, self.experts_TK, self.weights_TK, slot_sum)

    async def by_groups(self, asks: Sequence[Ask]) -> torch.Tensor:
        """Sorted by expert, each group's share in one call."""
        sorted_S, order_S = torch.sort(self.experts_TK.reshape(-1))
        rows_SD = self.hidden_TD[order_S // 2]
        counts = torch.bincount(sorted_S, minlength=8).tolist()
        share, start, calls = 8 // GROUPS, 0, []
        for number, ask in enumerate(asks):
            experts = range(number * share, (number + 1) * share)
            hit = [expert for expert in experts if counts[expert]]
            own = [counts[expert] for expert in hit]
            if hit:
                calls.append(ask(hit, own, rows_SD[start : start + sum(own)].clone()))
                start += sum(own)
        outputs_SD = torch.empty_like(rows_SD)
        outputs_SD[order_S] = torch.cat(list(await asyncio.gather(*calls)))
        outputs_TKD = outputs_SD.view(*self.experts_TK.shape, -1)
        return combine(outputs_TKD, self.weights_TK, self.experts_TK, "slot_sum", torch.float32)


@dataclass(frozen=True)
class _Plain:
    """One way to the plain deployments."""

    asks: Sequence[Ask]
    """One for each group."""
    pids: list[int]
    """Of the processes that work for it."""


def _plain(
    name: str, path: Path, loop: asyncio.AbstractEventLoop, proxy: str, stack: ExitStack
) -> dict[str, _Plain]:
    """The ways by name, the deployments running."""
    handles = _plain_handles(name, path)
    by_value = [handle.options(_by_reference=False) for handle in handles]
    proxied = stack.enter_context(proxied_groups(loop, proxy, _plain_names(name)))
    pids = [asyncio.run_coroutine_threadsafe(_pid(handle), loop).result() for handle in handles]
    return {
        "handle": _Plain([handle.remote for handle in handles], pids),
        "handle, by value": _Plain([handle.remote for handle in by_value], pids),
        "gRPC proxy": _Plain([group.ask for group in proxied], [*pids, *proxy_pids()]),
    }


async def _pid(handle: Any) -> int:
    return int(await handle.pid.remote())


def _over_grpc(caller: CoreCaller, hidden_size: int) -> CoreCaller:
    """The caller, whose streams are open and go over gRPC."""
    with patch.object(links, "dial", lambda name: None):
        _Routed(64, hidden_size).ours(caller)  # asks every group
    return caller


def _calls(
    routed: _Routed,
    callers: Mapping[str, CoreCaller],
    plain: dict[str, _Plain],
    loop: asyncio.AbstractEventLoop,
) -> dict[str, Call]:
    """Each contestant's blocking call, known to give what ours gives."""

    def blocking(asks: Sequence[Ask]) -> torch.Tensor:
        return asyncio.run_coroutine_threadsafe(routed.by_groups(asks), loop).result()

    calls = {name: partial(blocking, way.asks) for name, way in plain.items()}
    ours = {name: partial(routed.ours, caller) for name, caller in callers.items()}
    expected_TD = ours[OURS]()
    for call in [*ours.values(), *calls.values()]:
        torch.testing.assert_close(call(), expected_TD, rtol=0, atol=1e-5)
    return {**ours, **calls}


def _compete(calls: dict[str, Call], pids: dict[str, list[int]], tokens: int, quick: bool) -> Turns:
    contestants: list[Contestant] = [
        ClosedLoop(name, call, tokens, partial(list, pids[name]), warm_up=10)
        for name, call in calls.items()
    ]
    return take_turns(contestants, *((1, 0.3) if quick else (5, 1.5)))


def _bars(name: str, tokens: int, turns: Turns) -> list[Bar]:
    """Against handles as Serve documents them; those by value are in the table."""
    bars = []
    for what, of, bound in (
        ("p50", lambda turn: turn.p50_s, 5.0),
        ("CPU per token", lambda turn: turn.cpu_ms_per_token, 3.0),
    ):
        times = ratio(turns, "handle", OURS, of)
        bars.append(Bar(f"{name}, T={tokens}: {what} of a handle / ours", times, bound))
    return bars


def _measure(
    name: str,
    callers: Mapping[str, CoreCaller],
    plain: dict[str, _Plain],
    loop: asyncio.AbstractEventLoop,
    quick: bool,
    report: Report,
) -> None:
    core = callers[OURS].core
    assert core is not None
    ours = [replica.state.pid for replica in core.snapshot.replicas.values()]
    pids = dict.fromkeys(callers, ours) | {who: way.pids for who, way in plain.items()}
    for tokens in TOKENS:
        routed = _Routed(tokens, SHAPES[name].hidden_size)
        turns = _compete(_calls(routed, callers, plain, loop), pids, tokens, quick)
        if name == "demo layer":  # in larger layers compute is most of everybody's time
            report.bars += _bars(name, tokens, turns)
        report.tables[f"{name}, T={tokens}"] = [
            {"contestant": who, **summary(own)} for who, own in turns.items()
        ]


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("ray_serve", _ABOUT)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loop = stack.enter_context(event_loop())
        redis_url = stack.enter_context(redis_server(loop))
        proxy = stack.enter_context(ray_cluster_with_proxy())
        paths = {name: write_experts(shape, root) for name, shape in SHAPES.items()}
        stack.enter_context(_our_groups(paths, redis_url))
        for name, path in paths.items():
            plain = _plain(name, path, loop, proxy, stack)
            local, remote = (
                stack.enter_context(router_core(loop, redis_url, {0: 8}, mesh=_mesh_of(name)))
                for _ in range(2)
            )
            remote = _over_grpc(remote, SHAPES[name].hidden_size)
            _measure(name, {OURS: local, OVER_GRPC: remote}, plain, loop, quick, report)
    return report
