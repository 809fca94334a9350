"""What is wrong with a heartbeat: its replica gets no work, and people are told why. Pure."""

import math
from collections.abc import Mapping

from expertmesh.v1 import control_pb2

_TIMES = ("row_time_us", "queue_time_us", "batch_time_us", "expert_time_us", "row_cost_us")


def why_unusable(state: control_pb2.ReplicaState, num_experts: Mapping[int, int]) -> str:
    """The first thing that cannot be, with what was expected; "" if all is well.

    Args:
        num_experts: layer -> experts of the model.
    """
    host, _, port = state.address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        return f"address: expected host:port, got {state.address!r}"
    if not state.hidden_size:
        return "hidden_size: expected the width of a row, got 0"
    for name in _TIMES:
        value = getattr(state.load, name)
        if not math.isfinite(value) or value < 0:
            return f"load.{name}: expected a time in microseconds, got {value}"
    return _why_not_held(state, num_experts)


def _why_not_held(state: control_pb2.ReplicaState, num_experts: Mapping[int, int]) -> str:
    for held in state.holds:
        count = num_experts.get(held.layer, 0)
        if not count:
            return f"holds: expected MoE layers of the model, got layer {held.layer}"
        if beyond := [expert for expert in held.experts if expert >= count]:
            expected = f"experts 0 to {count - 1} of layer {held.layer}"
            return f"holds: expected {expected}, got expert {beyond[0]}"
    return ""
