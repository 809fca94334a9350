"""What each process holds, and whether it grows under load.

T tokens, D hidden size, K top-k.
"""

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

import torch
from transformers import AutoConfig

from benchmarks.generation import DEMO, random_mixtral
from benchmarks.harness.gateway import gateway_process
from benchmarks.harness.mesh import bench_mesh
from benchmarks.harness.plots import time_series
from benchmarks.harness.processes import pss_bytes
from benchmarks.harness.report import Bar, Report, Row
from benchmarks.harness.router import router_process
from expertmesh.client import Client, RouterClient
from expertmesh.services.settings import GatewaySettings

GROUPS = 4
SOAK_S = float(os.environ.get("EXPERTMESH_SOAK_S", "1800"))
SAMPLE_S = 5.0
WARM_UP_FRAC = 0.2
_MIB = 2**20
_BESIDE_EXPERTS_MIB = 350.0
_BESIDE_DENSE_MIB = 64.0
_GROWTH_PERCENT = 2.0
_ABOUT = (
    "Memory is PSS: a page shared by n processes counts 1/n in each. A Mixtral of 200 million "
    "parameters (float32) in four groups; router and gateway in processes of their own, and both "
    "again for the 3.6-million-parameter demo model, so that the difference is what the size of "
    "the model costs them. Load: layer calls of 1 to 256 tokens through RouterService and text "
    "through the gateway, without a pause. Growth compares the median of the last tenth of the "
    f"samples with that of the first tenth after {WARM_UP_FRAC:.0%} of warm-up."
)

Series = dict[str, list[float]]
"""MiB of each process at each sample."""


@contextmanager
def _processes(path: Path, num_experts: int, layers: int) -> Iterator[dict[str, tuple[int, str]]]:
    """(pid, address) of every process of a mesh, by name."""
    with ExitStack() as stack:
        mesh = stack.enter_context(bench_mesh(path, num_experts, layers, GROUPS))
        named = {f"replica {i}": (pid, "") for i, pid in enumerate(mesh.pids())}
        named["router"] = stack.enter_context(router_process(path, mesh.redis_url))
        named["gateway"] = stack.enter_context(gateway_process(path, mesh.redis_url))
        yield named


def _call_router(address: str, hidden_size: int, layers: int) -> Callable[[], object]:
    random = Random(0)
    client = RouterClient(address)

    def call() -> object:
        tokens = random.choice((1, 8, 64, 256))
        experts_TK = torch.rand(tokens, 8).topk(2).indices
        hidden_TD = torch.randn(tokens, hidden_size)
        return client.dispatch(
            random.randrange(layers), hidden_TD, experts_TK, torch.rand(tokens, 2)
        )

    return call


def _call_gateway(address: str) -> Callable[[], object]:
    random = Random(1)
    client = Client(address)

    def call() -> object:
        prompt = [random.randrange(2, 2000) for _ in range(random.randrange(4, 64))]
        return list(client.generate(prompt, max_new_tokens=16, ignore_eos=True))

    return call


def _soak(
    processes: dict[str, tuple[int, str]],
    hidden_size: int,
    layers: int,
    soak_s: float,
    sample_s: float,
) -> Series:
    stop = threading.Event()
    failures: list[BaseException] = []

    def keep(call: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                call()
        except Exception as error:
            failures.append(error)

    calls = [
        _call_router(processes["router"][1], hidden_size, layers),
        _call_gateway(processes["gateway"][1]),
    ]
    threads = [threading.Thread(target=keep, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    series: Series = {name: [] for name in processes}
    end_s = time.monotonic() + soak_s
    while time.monotonic() < end_s:
        time.sleep(sample_s)
        for name, (pid, _) in processes.items():
            series[name].append(pss_bytes(pid) / _MIB)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures
    return series


def _growth_percent(values: Sequence[float]) -> float:
    warm = values[int(len(values) * WARM_UP_FRAC) :]
    tenth = max(1, len(warm) // 10)
    first, last = statistics.median(warm[:tenth]), statistics.median(warm[-tenth:])
    return 100 * (last / first - 1)


def _kv_cache_mib(path: Path) -> float:
    """Keys and values of as many tokens as the gateway's cache holds by default."""
    config = AutoConfig.from_pretrained(path)
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    tokens = int(GatewaySettings().kv_cache_tokens)
    return float(per_token * tokens * config.dtype.itemsize / _MIB)


def _tiny() -> dict[str, float]:
    with _processes(DEMO, 8, 4) as processes:
        return {name: pss_bytes(pid) / _MIB for name, (pid, _) in processes.items()}


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("memory", _ABOUT)
    tiny = _tiny()
    with tempfile.TemporaryDirectory() as root:
        path, config = random_mixtral(Path(root))
        layers, hidden_size = config.num_hidden_layers, config.hidden_size
        expert_bytes = 4 * 3 * hidden_size * config.intermediate_size * 8 * layers
        dense_mib = (path / "model.safetensors").stat().st_size / _MIB - expert_bytes / _MIB
        experts_mib = expert_bytes / GROUPS / _MIB
        kv_mib = _kv_cache_mib(path) - _kv_cache_mib(DEMO)
        with _processes(path, 8, layers) as processes:
            start = {name: pss_bytes(pid) / _MIB for name, (pid, _) in processes.items()}
            series = _soak(
                processes, hidden_size, layers, *((6, 0.5) if quick else (SOAK_S, SAMPLE_S))
            )
    rows: list[Row] = []
    for name, values in series.items():
        growth = _growth_percent(values)
        rows.append(
            {
                "process": name,
                "MiB at start": start[name],
                "MiB at the end": values[-1],
                "growth %": growth,
            }
        )
        if not quick:
            report.bars.append(
                Bar(f"{name}: growth in {SOAK_S / 60:.0f} min", growth, _GROWTH_PERCENT, True, "%")
            )
    own_mib = dense_mib + kv_mib
    report.raw["MiB of the gateway's own"] = {"dense part": dense_mib, "more KV cache": kv_mib}
    for name, own in (("router", 0.0), ("gateway", own_mib)):
        beside = start[name] - tiny[name] - own
        what = f"{name}: more than with a tiny model, beside its own dense part and KV cache"
        what += f" ({own:.0f} MiB)"
        report.bars.append(Bar(what, beside, _BESIDE_DENSE_MIB, True, "MiB"))
    most = max(series[f"replica {i}"][-1] for i in range(GROUPS)) - experts_mib
    what = f"a replica beside its experts ({experts_mib:.0f} MiB), at the end"
    report.bars.append(Bar(what, most, _BESIDE_EXPERTS_MIB, True, "MiB"))
    report.tables["Memory"] = rows
    report.raw["MiB every 5 s"] = {n: [round(v, 1) for v in own] for n, own in series.items()}
    if not quick:
        report.plots.append(time_series("memory", series, SAMPLE_S, "PSS (MiB)"))
    return report
