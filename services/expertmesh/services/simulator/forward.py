"""What a forward takes, from layer calls that were planned by the router's code. Pure.

Gateways go through the layers in step with their answers, so the replicas of a layer and the way
there and back make a closed queueing network. Of M forwards that go on at the same time, each
spends S at the replica that answers it last and Z elsewhere, and one replica, the busiest, has D to
do for all of them together. The time a call takes, waiting included, is then

    R = (D - Z + sqrt((D - Z)^2 + 4 S Z)) / 2

which is S while nobody is in another's way (D = S), D - Z if all wait for one replica, and for one
station that takes S per call (D = M S) what Schweitzer and Bard have ("Approximate analysis of
multiclass closed networks of queues", 1979).

Where not all of the M are planned, D is what the busiest replica has of those that are, or what the
replicas of a group have of all M in the mean, if that is more: who is busy gets less of the others.
Calls that wait together for a replica are merged if they are to one layer, as those of gateways in
step are: of the part of its time that a call waits, an expert's weights are read once for all.
How far that is from what `calls.py` finds is in docs/simulation.md.

L simulated layers, C calls planned for each of them, N replicas, G groups.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from expertmesh.router.waterfill import Shares
from expertmesh.services.simulator.fleet import VirtualReplica

_ROUNDS = 4
Floats = NDArray[np.float64]


def response_s(service_s: Floats, busiest_s: Floats, around_s: float) -> Floats:
    """Time of a call, waiting included; S, D and Z above."""
    more_s = busiest_s - around_s
    found: Floats = (more_s + np.sqrt(more_s * more_s + 4 * service_s * around_s)) / 2
    return np.maximum(found, service_s)


class PlannedForward:
    """Calls that go on at the same time, all of the same number of tokens.

    Args:
        calls: what every call to each of the layers gives to whom.
        forwards: that go on at the same time; the calls stand for them.
        weight: layers of the model that each of the simulated ones stands for.
    """

    def __init__(
        self,
        num_tokens: int,
        calls: Sequence[Sequence[Shares]],
        replicas: Sequence[VirtualReplica],
        forwards: int,
        weight: float,
    ) -> None:
        self.num_tokens = num_tokens
        self.replicas = replicas
        self.weight = weight
        self._num_forwards = forwards
        places = {replica.name: place for place, replica in enumerate(replicas)}
        shape = (len(calls), len(calls[0]), len(replicas))
        experts_LCN, self._rows_LCN = np.zeros(shape), np.zeros(shape)
        for layer, own in enumerate(calls):
            for number, shares in enumerate(own):
                for parts in shares.values():
                    for name, count in parts:
                        experts_LCN[layer, number, places[name]] += 1
                        self._rows_LCN[layer, number, places[name]] += count
        groups = np.array([replica.group for replica in replicas])
        self._groups_NG = groups[:, None] == np.arange(groups.max() + 1)[None, :]
        self._groups_NG = self._groups_NG / np.maximum(1, self._groups_NG.sum(0))
        costs = [replica.costs for replica in replicas]
        batch_N, expert_N, row_N = (
            np.array([getattr(own, name) for own in costs]) / 1e6
            for name in ("batch_us", "expert_us", "row_us")
        )
        self._fixed_LCN = batch_N * (experts_LCN > 0) + expert_N * experts_LCN
        self._poured_LCN = row_N * self._rows_LCN

    def forward_s(self, num_tokens: float, around_s: float, share: float = 1.0) -> float:
        """Time of a forward of so many tokens.

        Args:
            around_s: of a layer, beside the compute of replicas.
            share: of the forwards planned for that do go on.
        """
        return self.weight * float((around_s + self._calls(num_tokens, around_s, share)[0]).sum())

    def wait_s(self, num_tokens: float, around_s: float, share: float = 1.0) -> float:
        """Mean time that a call waits for replicas; arguments as `forward_s`."""
        response_L, service_L = self._calls(num_tokens, around_s, share)
        return float((response_L - service_L).mean())

    def _calls(self, num_tokens: float, around_s: float, share: float) -> tuple[Floats, Floats]:
        """Time of a call to each layer with and without waiting.

        The longer calls wait, the more of them are merged, and the less they wait.
        """
        poured_LCN = self._poured_LCN * (num_tokens / self.num_tokens)
        service_L = (self._fixed_LCN + poured_LCN).max(2).mean(1)
        forwards = max(1.0, self._num_forwards * share)
        response_L, merged_L = service_L, np.zeros(len(service_L))
        for _ in range(_ROUNDS):
            busiest_L = self._busiest_s(forwards, merged_L, poured_LCN.mean(1))
            response_L = response_s(service_L, busiest_L, around_s)
            merged_L = (merged_L + 1 - service_L / response_L) / 2
        return response_L, service_L

    def _busiest_s(self, forwards: float, merged_L: Floats, poured_LN: Floats) -> Floats:
        planned = min(forwards, float(self._fixed_LCN.shape[1]))
        few_L = (self._together(planned, merged_L) + poured_LN * planned).max(1)
        all_LN = self._together(forwards, merged_L) + poured_LN * forwards
        busiest: Floats = np.maximum(few_L, (all_LN @ self._groups_NG).max(1))
        return busiest

    def _together(self, forwards: float, merged_L: Floats) -> Floats:
        """What so many forwards cost beside their rows, if such a part of their calls is merged."""
        each_LN: Floats = self._fixed_LCN.mean(1) * forwards
        merged_LN = np.minimum(self._fixed_LCN.max(1), each_LN)
        each_LN += merged_L[:, None] * (merged_LN - each_LN)
        return each_LN

    def work(self, forwards: float, waiting: float, tokens: float) -> tuple[Floats, Floats]:
        """Rows and seconds of every replica, [N] each.

        Args:
            forwards: of all gateways together.
            waiting: share of the time at replicas that calls waited, times `forwards`.
            tokens: of all these forwards together.
        """
        scale = self.weight * tokens / self.num_tokens
        rows_N = self._rows_LCN.mean(1).sum(0) * scale
        rounds = self.weight * forwards / self._num_forwards
        part = waiting / forwards if forwards else 0.0
        merged_L = np.full(len(self._rows_LCN), part)
        busy_N = self._together(self._num_forwards, merged_L).sum(0) * rounds
        return rows_N, busy_N + self._poured_LCN.mean(1).sum(0) * scale

    def imbalance(self) -> float:
        """Most that a replica has to do, over the mean, in the mean over the layers."""
        took_LN = (self._fixed_LCN + self._poured_LCN).sum(1)
        return float((took_LN.max(1) / took_LN.mean(1)).mean())
