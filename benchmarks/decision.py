"""What it costs to decide where a call's rows go, beside the gate that every MoE layer has anyway.

T tokens, D hidden size, E experts, K top-k, S slots (T * K).
"""

from collections.abc import Callable

import torch

from benchmarks.harness.report import Bar, Report, Row
from benchmarks.harness.turns import ClosedLoop, ratio, summary, take_turns
from expertmesh.router.core import RouterCore
from expertmesh.router.families import routing_spec
from expertmesh.router.gate import GateWeights, route
from expertmesh.runtime.telemetry import configure
from expertmesh.v1 import control_pb2, tensor_pb2

NUM_EXPERTS, TOP_K, HIDDEN_SIZE, REPLICAS = 64, 8, 2048, 8
TOKENS = (1, 64)
BOUND = 2.0
_CALLS = 20
"""In one measured call: a decision is too short to be timed alone."""
_ABOUT = (
    f"OLMoE's gate: {NUM_EXPERTS} experts, top-{TOP_K}, D={HIDDEN_SIZE}, bfloat16; {REPLICAS} "
    "replicas. **gate alone**: the linear layer and top-k. **whole**: the router's gate (softmax, "
    "weights) and the plan: which rows go to which replica. **single copies**: each replica holds "
    "an eighth of the experts; **two copies**: each holds a quarter, so every expert has a choice. "
    f"One thread; times are of {_CALLS} decisions."
)


def _gate() -> tuple[object, GateWeights]:
    from transformers import OlmoeConfig

    config = OlmoeConfig(
        num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, hidden_size=HIDDEN_SIZE
    )
    weight_ED = torch.randn(NUM_EXPERTS, HIDDEN_SIZE).mul_(0.02).bfloat16()
    return routing_spec(config, 0), GateWeights(weight_ED)


def _core(copies: int) -> RouterCore:
    """A router that has heard of the replicas; nothing is sent."""
    core = RouterCore("m", {0: NUM_EXPERTS}, configure("router", None), max_message_bytes=1 << 20)
    groups = REPLICAS // copies
    each = NUM_EXPERTS // groups
    for number in range(REPLICAS):
        first = number % groups * each
        core.on_state(
            control_pb2.ReplicaState(
                replica=f"g{number % groups}#{number // groups}",
                group=f"g{number % groups}",
                model="m",
                address="127.0.0.1:1",
                status=control_pb2.REPLICA_STATUS_READY,
                hidden_size=HIDDEN_SIZE,
                dtype=tensor_pb2.DTYPE_BFLOAT16,
                holds=[control_pb2.LayerExperts(layer=0, experts=range(first, first + each))],
                load=control_pb2.ReplicaLoad(
                    row_time_us=20, batch_time_us=50, expert_time_us=20, row_cost_us=5
                ),
            )
        )
    return core


def _times(call: Callable[[], object]) -> Callable[[], None]:
    def many() -> None:
        for _ in range(_CALLS):
            call()

    return many


def _contestants(num_tokens: int) -> list[ClosedLoop]:
    spec, gate = _gate()
    hidden_TD = torch.randn(num_tokens, HIDDEN_SIZE).bfloat16()

    def alone() -> object:
        logits_TE = torch.nn.functional.linear(hidden_TD, gate.weight_ED)
        return logits_TE.topk(TOP_K)

    def gate_only() -> object:
        return route(spec, hidden_TD, gate)  # type: ignore[arg-type]

    def whole(core: RouterCore) -> object:
        experts_TK = route(spec, hidden_TD, gate).experts_TK  # type: ignore[arg-type]
        return core.plan_call(0, experts_TK)

    single, double = _core(1), _core(2)
    named = {
        "gate alone": alone,
        "router's gate": gate_only,
        "whole, single copies": lambda: whole(single),
        "whole, two copies": lambda: whole(double),
    }
    return [ClosedLoop(name, _times(call), _CALLS) for name, call in named.items()]


def run(*, quick: bool = False) -> Report:
    """See `benchmarks.__main__`."""
    report = Report("decision", _ABOUT)
    torch.set_num_threads(1)
    with torch.inference_mode():
        for num_tokens in TOKENS:
            turns = take_turns(_contestants(num_tokens), *((1, 0.05) if quick else (15, 0.3)))
            rows: list[Row] = []
            for name, own in turns.items():
                times = ratio(turns, name, "gate alone")
                median_us = 1e3 * summary(own)["p50_ms"] / _CALLS
                rows.append({"decision": name, "p50_us": median_us, "times the gate alone": times})
                if name.startswith("whole"):
                    what = f"T={num_tokens}, {name}: times the gate alone"
                    report.bars.append(Bar(what, times, BOUND, at_most=True))
            report.tables[f"T={num_tokens}"] = rows
    return report
