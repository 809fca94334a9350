"""Our transport beside plain Ray Serve: the same experts in the same Ray session.

T tokens, D hidden size, K top-k, S rows (T * K).
"""

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import plain_serve
from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.mesh import MODEL, event_loop, redis_server, router_core
from benchmarks.harness.report import Bar, Report
from benchmarks.harness.turns import ClosedLoop, Contestant, Turns, ratio, summary, take_turns
from expertmesh.experts.assignment import split_evenly
from expertmesh.experts.deployment import ExpertGroupArgs
from expertmesh.router.combine import combine
from expertmesh.services.callers import CoreCaller
from expertmesh.services.ray_cluster import deploy, ray_cluster, wait_running
from expertmesh.services.serve_config import EXPERTS_IMPORT_PATH, application
from expertmesh.v1 import router_pb2

GROUPS = 4
TOKENS = (1, 64)
SHAPES = {
    "demo layer": MoeShape(hidden_size=128, ffn_size=256),
    "h=512 layer": MoeShape(hidden_size=512, ffn_size=1408),
}
_START_S = 120.0
_ABOUT = (
    f"8 experts, top-2, in {GROUPS} groups, float32, one caller. **ours**: expert groups deployed "
    "on Ray Serve, called past it. **handle**: the same experts in one plain deployment a group, "
    "called through DeploymentHandles with asyncio.gather from the driver, tensors by reference "
    "(what Serve documents) and by value (an option with an underscore). CPU: the client and "
    "the replicas it calls; Ray's own processes, which only the handles use, are left out."
)

Call = Callable[[], torch.Tensor]


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


def _plain_handles(name: str, path: Path) -> list[Any]:
    """A handle for each group, the deployments running."""
    from ray import cloudpickle, serve

    cloudpickle.register_pickle_by_value(plain_serve)  # type: ignore[no-untyped-call]
    group: Any = serve.deployment(ray_actor_options={"num_cpus": 0})(plain_serve.PlainGroup)
    share = 8 // GROUPS
    return [
        serve.run(
            group.bind(str(path), list(range(number * share, (number + 1) * share))),
            name=f"plain-{_mesh_of(name)}-{number}",
            route_prefix=None,
        )
        for number in range(GROUPS)
    ]


class _Routed:
    """One call's input, and what each group gets of it."""

    def __init__(self, tokens: int, hidden_size: int) -> None:
        self.hidden_TD = torch.randn(tokens, hidden_size)
        self.experts_TK = torch.rand(tokens, 8).topk(2).indices
        self.weights_TK = torch.rand(tokens, 2)

    def ours(self, caller: CoreCaller) -> torch.Tensor:
        """Through the router core."""
        slot_sum = router_pb2.COMBINE_SLOT_SUM
        return caller.dispatch(0, self.hidden_TD, self.experts_TK, self.weights_TK, slot_sum)

    async def by_handles(self, handles: list[Any]) -> torch.Tensor:
        """Sorted by expert, each group's share in one call."""
        sorted_S, order_S = torch.sort(self.experts_TK.reshape(-1))
        rows_SD = self.hidden_TD[order_S // 2]
        counts = torch.bincount(sorted_S, minlength=8).tolist()
        share, start, calls = 8 // GROUPS, 0, []
        for number, handle in enumerate(handles):
            experts = range(number * share, (number + 1) * share)
            hit = [expert for expert in experts if counts[expert]]
            own = [counts[expert] for expert in hit]
            if hit:
                calls.append(handle.remote(hit, own, rows_SD[start : start + sum(own)].clone()))
                start += sum(own)
        outputs_SD = torch.empty_like(rows_SD)
        outputs_SD[order_S] = torch.cat(list(await asyncio.gather(*calls)))
        outputs_TKD = outputs_SD.view(*self.experts_TK.shape, -1)
        return combine(outputs_TKD, self.weights_TK, self.experts_TK, "slot_sum", torch.float32)


def _compete(
    caller: CoreCaller,
    our_pids: list[int],
    handles: list[Any],
    run: Callable[[Coroutine[Any, Any, Any]], Any],
    tokens: int,
    shape: MoeShape,
    turns: tuple[int, float],
) -> Turns:
    routed = _Routed(tokens, shape.hidden_size)
    by_value = [handle.options(_by_reference=False) for handle in handles]
    plain_pids = [run(_pid(handle)) for handle in handles]
    calls: dict[str, tuple[Call, list[int]]] = {
        "ours": (lambda: routed.ours(caller), our_pids),
        "handle": (lambda: run(routed.by_handles(handles)), plain_pids),
        "handle, by value": (lambda: run(routed.by_handles(by_value)), plain_pids),
    }
    expected_TD = routed.ours(caller)
    for call, _ in calls.values():
        torch.testing.assert_close(call(), expected_TD, rtol=0, atol=1e-5)
    contestants: list[Contestant] = [
        ClosedLoop(name, call, tokens, lambda pids=pids: pids, warm_up=10)  # type: ignore[misc]
        for name, (call, pids) in calls.items()
    ]
    return take_turns(contestants, *turns)


async def _pid(handle: Any) -> int:
    return int(await handle.pid.remote())


def _bars(name: str, tokens: int, turns: Turns) -> list[Bar]:
    """Against handles as Serve documents them; those by value are in the table."""
    bars = []
    for what, of, bound in (
        ("p50", lambda turn: turn.p50_s, 5.0),
        ("CPU per token", lambda turn: turn.cpu_ms_per_token, 3.0),
    ):
        times = ratio(turns, "handle", "ours", of)
        bars.append(Bar(f"{name}, T={tokens}: {what} of a handle / ours", times, bound))
    return bars


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("ray_serve", _ABOUT)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loop = stack.enter_context(event_loop())
        redis_url = stack.enter_context(redis_server(loop))
        stack.enter_context(ray_cluster())
        paths = {name: write_experts(shape, root) for name, shape in SHAPES.items()}
        stack.enter_context(_our_groups(paths, redis_url))
        for name, path in paths.items():
            handles = _plain_handles(name, path)
            caller = stack.enter_context(router_core(loop, redis_url, {0: 8}, mesh=_mesh_of(name)))
            assert caller.core is not None
            pids = [replica.state.pid for replica in caller.core.snapshot.replicas.values()]
            for tokens in TOKENS:
                turns = _compete(
                    caller,
                    pids,
                    handles,
                    lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(),
                    tokens,
                    SHAPES[name],
                    (1, 0.3) if quick else (5, 1.5),
                )
                if name == "demo layer":  # in larger layers compute is most of everybody's time
                    report.bars += _bars(name, tokens, turns)
                report.tables[f"{name}, T={tokens}"] = [
                    {"contestant": who, **summary(own)} for who, own in turns.items()
                ]
    return report
