"""What callers notice of experts that move under load: real processes, bits compared."""

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.harness.checkpoints import MoeShape, write_experts
from benchmarks.harness.mesh import BenchMesh, bench_mesh
from benchmarks.harness.report import Bar, Report, Row
from benchmarks.harness.turns import percentile
from expertmesh.runtime.child import dying_with_parent
from expertmesh.v1 import router_pb2

SHAPE = MoeShape(hidden_size=512, ffn_size=1024)
TOKENS, CALLERS = 16, 2
_GUESTS = 2
_ABOUT = (
    f"A layer of 8 experts, top-2, D={SHAPE.hidden_size}, F={SHAPE.ffn_size}, float32, in two "
    f"groups, a process each, deterministic mode; {CALLERS} callers in closed loops with calls of "
    f"{TOKENS} tokens, every answer compared bit by bit. **moving**: calls that begin while the "
    "controller's executor, in a process of its own, lets one replica take two experts of the "
    "other on, and give them up again (0.3 s without rows for them, then freed). **calm**: as "
    "many seconds without a move, in turns. Latencies in ms."
)


@dataclass
class Calls:
    """Closed loops over one mesh."""

    mesh: BenchMesh
    latencies_s: dict[str, list[float]] = field(default_factory=dict)
    """By what goes on when a call begins."""
    num_wrong: int = 0
    num_errors: int = 0
    phase: str = "warm-up"
    is_over: bool = False

    def loop(self, seed: int) -> None:
        """One caller, until it is over."""
        random = torch.Generator().manual_seed(seed)
        hidden_TD = torch.randn(TOKENS, SHAPE.hidden_size, generator=random)
        weights_TK, experts_TK = torch.rand(TOKENS, 8, generator=random).topk(SHAPE.top_k)
        slot_sum = router_pb2.COMBINE_SLOT_SUM
        expected_TD = self.mesh.caller.dispatch(0, hidden_TD, experts_TK, weights_TK, slot_sum)
        while not self.is_over:
            phase, began_s = self.phase, time.perf_counter()
            try:
                out_TD = self.mesh.caller.dispatch(0, hidden_TD, experts_TK, weights_TK, slot_sum)
            except Exception:
                self.num_errors += 1
                continue
            took_s = time.perf_counter() - began_s
            self.latencies_s.setdefault(phase, []).append(took_s)
            self.num_wrong += not torch.equal(out_TD, expected_TD)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The callers' threads."""
        threads = [threading.Thread(target=self.loop, args=(seed,)) for seed in range(CALLERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.is_over = True
            for thread in threads:
                thread.join()


@contextmanager
def mover(redis_url: str) -> Iterator["subprocess.Popen[str]"]:
    """The process that moves experts."""
    command = dying_with_parent([sys.executable, "-m", "benchmarks.harness.mover", redis_url])
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert _answer(process) == "ready"
        yield process
    finally:
        process.terminate()
        process.wait()


def _answer(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def _move(process: "subprocess.Popen[str]", step: str) -> None:
    assert process.stdin
    process.stdin.write(f"{step}\n")
    process.stdin.flush()
    outcome = _answer(process)
    assert outcome == "done", outcome


def _rounds(calls: Calls, count: int) -> float:
    """Moves and calm in turns; mean seconds of a move."""
    moved_s = []
    with mover(calls.mesh.redis_url) as process, calls.running():
        time.sleep(0.5)
        for _ in range(count):
            calls.phase, began_s = "moving", time.perf_counter()
            for kind in ("add", "drop"):
                for expert in range(_GUESTS):
                    _move(process, f"{kind} 0 {expert} g1#1")
            moved_s.append(time.perf_counter() - began_s)
            calls.phase = "calm"
            time.sleep(moved_s[-1])
    return sum(moved_s) / count / (2 * _GUESTS)


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("moving", _ABOUT)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = write_experts(SHAPE, Path(folder))
        guest_bytes = _GUESTS * SHAPE.expert_bytes
        with bench_mesh(path, 8, 1, 2, guest_memory_bytes=guest_bytes, deterministic=True) as mesh:
            calls = Calls(mesh)
            step_s = _rounds(calls, 1 if quick else 20)
    rows: list[Row] = []
    for phase in ("calm", "moving"):
        own_ms = [1e3 * taken for taken in calls.latencies_s[phase]]
        points = {f"p{100 * q:g}": f"{percentile(own_ms, q):.2f}" for q in (0.5, 0.9, 0.99, 0.999)}
        rows.append({"phase": phase, "calls": len(own_ms), **points, "most": f"{max(own_ms):.1f}"})
    report.tables[f"Layer calls; a step of a move takes {step_s:.2f} s, mostly waiting"] = rows
    calm, moving = (percentile(calls.latencies_s[phase], 0.99) for phase in ("calm", "moving"))
    report.bars = [
        Bar("errors", calls.num_errors, 0, at_most=True, unit=""),
        Bar("answers that differ in a bit", calls.num_wrong, 0, at_most=True, unit=""),
        Bar("p99 while experts move, over calm", moving / calm, 1.5, at_most=True),
    ]
    return report
