"""Where router, replica and gateway spend their CPU time: flame graphs and their sums.

T tokens, D hidden size, K top-k, E experts.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

import torch

from benchmarks.harness.flame_graph import flame_graph
from benchmarks.harness.gateway import gateway_process
from benchmarks.harness.mesh import bench_mesh
from benchmarks.harness.py_spy import record
from benchmarks.harness.report import RESULTS, Report, Row
from benchmarks.harness.router import router_process
from benchmarks.harness.stacks import OURS, Frame, Stacks, inclusive, innermost, self_time
from expertmesh.client import Client, RouterClient

GROUPS = 4
DEMO = Path(__file__).parents[1] / "examples" / "demo-moe"
_D, _E, _K, _LAYERS = 128, 8, 2, 4
"""Of the demo model."""
_WRITERS = 4
_ROUTER_CALLERS = 2
_TOKENS = (1, 8, 64)
_PROMPTS = ("And it came to pass,", "import os", "namespace c10 {", "The quick brown fox")
_RATE_HZ = 200
_WARM_UP_S = 2.0
_TOP = 12
_C_CODE = {
    "event": "C code of the event loop",
    "thread": "C code of other threads",
    "native": "threads that never run Python",
}
_PACKAGES = ("expertmesh", "transformers", "torch", "grpc", "asyncio", "redis")
_ABOUT = (
    f"The demo model (bfloat16) in {GROUPS} groups, gateway and router in processes of their own, "
    f"under load: {_WRITERS} clients that have text written by the gateway, and {_ROUTER_CALLERS} "
    f"that send layer calls of {', '.join(map(str, _TOKENS))} tokens to RouterService. py-spy "
    "looks at one process after the other. How much CPU time each thread used, and how long it "
    "waited for a core, is the kernel's word; py-spy's samples, without those that only waited, "
    "say on what. All numbers are percent of the CPU time of the process. Frames are Python's: "
    "what C code uses counts for the function that called it (torch's products), or for the event "
    "loop (uvloop, gRPC's Cython). *In the stack* counts a module with all that it called, so that "
    "a column adds up to more than 100; *innermost* gives each sample to one row."
)


@contextmanager
def _processes() -> Iterator[dict[str, tuple[int, str]]]:
    """(pid, address) of what is looked at, by name."""
    with ExitStack() as stack:
        mesh = stack.enter_context(bench_mesh(DEMO, _E, _LAYERS, GROUPS))
        router = stack.enter_context(router_process(DEMO, mesh.redis_url))
        gateway = stack.enter_context(gateway_process(DEMO, mesh.redis_url))
        yield {"router": router, "replica": (mesh.pids()[0], ""), "gateway": gateway}


def _layer_calls(client: RouterClient, seed: int) -> Callable[[], object]:
    random = Random(seed)

    def call() -> object:
        tokens = random.choice(_TOKENS)
        hidden_TD = torch.randn(tokens, _D, dtype=torch.bfloat16)
        weights_TK, experts_TK = torch.rand(tokens, _E).topk(_K)
        return client.dispatch(random.randrange(_LAYERS), hidden_TD, experts_TK, weights_TK)

    return call


def _texts(client: Client, seed: int) -> Callable[[], object]:
    prompt = _PROMPTS[seed % len(_PROMPTS)]
    return lambda: list(client.generate(prompt, max_new_tokens=48, ignore_eos=True))


def _calls(stack: ExitStack, processes: dict[str, tuple[int, str]]) -> list[Callable[[], object]]:
    router, gateway = processes["router"][1], processes["gateway"][1]
    texts = [_texts(stack.enter_context(Client(gateway)), n) for n in range(_WRITERS)]
    return texts + [
        _layer_calls(stack.enter_context(RouterClient(router)), n) for n in range(_ROUTER_CALLERS)
    ]


@contextmanager
def _under_load(calls: list[Callable[[], object]]) -> Iterator[None]:
    """Each call made again and again, by a thread of its own, until the block ends."""
    stop, failures = threading.Event(), list[Exception]()

    def keep(call: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                call()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=keep, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    try:
        time.sleep(_WARM_UP_S)
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures


def _stage(frame: Frame) -> str:
    """Modules of ours and of transformers, loops and threads; what they call counts for them."""
    if not frame.module:
        return frame.function
    ours_or_model = frame.module.startswith((OURS, "transformers/"))
    return frame.module.removeprefix(OURS) if ours_or_model else ""


def _package(frame: Frame) -> str:
    """Whose code it is."""
    if not frame.module:
        return _C_CODE.get(frame.function.split(" ")[0], "other Python")
    package, *rest = frame.module.split("/")
    return package if rest and package in _PACKAGES else "other Python"


def _packages(recorded: Mapping[str, Stacks]) -> list[Row]:
    own_s = {name: self_time(stacks, _package) for name, stacks in recorded.items()}
    totals_s = {name: sum(sums.values()) for name, sums in own_s.items()}
    packages = sorted({package for sums in own_s.values() for package in sums})
    return [
        {"code": p, **{n: 100 * s.get(p, 0.0) / totals_s[n] for n, s in own_s.items()}}
        for p in packages
    ]


def _stages(stacks: Stacks) -> list[Row]:
    total_s = sum(stacks.values())
    own_s = innermost(stacks, _stage)
    rows = inclusive(stacks, _stage).items()
    return [
        {
            "module": name,
            "in the stack, %": 100 * within_s / total_s,
            "innermost of these, %": 100 * own_s.get(name, 0.0) / total_s,
        }
        for name, within_s in list(rows)[:_TOP]
    ]


def _frames(stacks: Stacks) -> list[Row]:
    total_s = sum(stacks.values())
    rows = list(self_time(stacks).items())[:_TOP]
    return [{"function": name, "itself, %": 100 * own_s / total_s} for name, own_s in rows]


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("flames", _ABOUT)
    torch.set_num_threads(1)
    seconds = 2.0 if quick else 15.0
    with ExitStack() as stack:
        processes = stack.enter_context(_processes())
        stack.enter_context(_under_load(_calls(stack, processes)))
        recorded = {name: record(pid, seconds, _RATE_HZ) for name, (pid, _) in processes.items()}
    report.tables["whose code runs, %"] = _packages(recorded)
    for name, stacks in recorded.items():
        report.tables[f"{name}: stages"] = _stages(stacks)
        report.tables[f"{name}: functions"] = _frames(stacks)
        if not quick:
            plot = f"flame-{name}.svg"
            title = f"{name}: where {sum(stacks.values()):.1f} s of CPU time went"
            (RESULTS / plot).write_text(flame_graph(title, stacks))
            report.plots.append(plot)
    return report
