"""Why a call would go where it goes, in the words of what decides it.

T tokens, E experts, K experts per token.
"""

from collections.abc import Mapping, Sequence

from expertmesh.router.core import RouterCore
from expertmesh.router.pools import Standing, row_us
from expertmesh.router.selector import Selected
from expertmesh.router.snapshot import Replica
from expertmesh.v1 import router_pb2

_OTHERS = 4
"""Experts shown beside those that are selected or are the gate's choice."""
Given = Mapping[tuple[int, int], Mapping[str, int]]
"""(token, expert) -> replica -> rows"""


class Explanation:
    """Of one call; `response` makes the message.

    Args:
        now_s: by the core's clock.
    """

    def __init__(self, core: RouterCore, layer: int, selected: Selected, now_s: float) -> None:
        self._core, self._layer, self._now_s = core, layer, now_s
        self._selected = selected
        selection, scored = selected.selection, selected.scored
        self._experts: list[list[int]] = selection.experts_TK.tolist()
        self._exact: list[list[int]] = scored.top(scored.spec.top_k).tolist()
        self._order: list[list[int]] = scored.choice_TE.argsort(1, descending=True).tolist()
        self._given: Given = {}

    def response(self) -> router_pb2.ExplainResponse:
        """The whole explanation."""
        version = self._core.snapshot.version
        self._given = self._plan()
        tokens = [self._token(token) for token in range(len(self._experts))]
        return router_pb2.ExplainResponse(tokens=tokens, snapshot_version=version)

    def _plan(self) -> Given:
        given: dict[tuple[int, int], dict[str, int]] = {}
        top_k = len(self._experts[0])
        for shipment in self._core.plan_call(self._layer, self._selected.selection.experts_TK):
            experts = zip(shipment.experts, shipment.rows_per_expert, strict=True)
            each = [expert for expert, count in experts for _ in range(count)]
            for expert, slot in zip(each, shipment.slots_R, strict=True):
                rows = given.setdefault((slot // top_k, expert), {})
                rows[shipment.replica] = rows.get(shipment.replica, 0) + 1
        return given

    def _token(self, token: int) -> router_pb2.TokenExplanation:
        own = {*self._experts[token], *self._exact[token]}
        others = [expert for expert in self._order[token] if expert not in own][:_OTHERS]
        shown = sorted([*own, *others], key=self._order[token].index)
        given_up = float(self._selected.selection.given_up_T[token])
        return router_pb2.TokenExplanation(
            experts=[self._expert(token, expert) for expert in shown], given_up_mass=given_up
        )

    def _expert(self, token: int, expert: int) -> router_pb2.ExpertOption:
        scored, selection = self._selected.scored, self._selected.selection
        is_selected = expert in self._experts[token]
        weight = 0.0
        if is_selected:
            weight = float(selection.weights_TK[token, self._experts[token].index(expert)])
        return router_pb2.ExpertOption(
            expert=expert,
            logit=float(scored.logits_TE[token, expert]),
            mass=float(scored.mass()[token, expert]),
            rank=self._order[token].index(expert),
            is_gates_choice=expert in self._exact[token],
            is_selected=is_selected,
            weight=weight,
            reason=self._why_expert(token, expert),
            replicas=self._replicas(token, expert),
        )

    def _why_expert(self, token: int, expert: int) -> str:
        is_exact, is_selected = expert in self._exact[token], expert in self._experts[token]
        cost_us = self._selected.costs.costs_us[expert]
        if is_selected:
            return "the gate's choice" if is_exact else f"costs {cost_us:.0f} us, within the budget"
        if not is_exact:
            return "the gate ranks others higher"
        least_us = min(self._selected.costs.costs_us)
        if cost_us > self._selected.costs.cheap_us:
            return f"given up: costs {cost_us:.0f} us, others from {least_us:.0f} us"
        return "given up: top_k, max_groups or the policy has no place for it"

    def _replicas(self, token: int, expert: int) -> list[router_pb2.ReplicaOption]:
        given = self._given.get((token, expert), {})
        found = []
        for name, replica in sorted(self._core.snapshot.replicas.items()):
            if any(h.layer == self._layer and expert in h.experts for h in replica.state.holds):
                found.append(self._replica(replica, expert, given.get(name, 0)))
        costs = [own.cost_us for own in found if not own.reason]
        for own in found:
            own.reason = own.reason or _why_replica(own, costs)
        return found

    def _replica(self, replica: Replica, expert: int, rows: int) -> router_pb2.ReplicaOption:
        standing: Standing = self._core.standing(replica.name, self._layer, self._now_s)
        resident = standing.resident is None or expert in standing.resident
        reason = ""
        if not replica.takes_work:
            reason = f"set aside: {replica.set_aside or 'it is draining'}"
        return router_pb2.ReplicaOption(
            replica=replica.name,
            rows=rows,
            cost_us=row_us(expert, standing),
            in_flight_rows=self._core.in_flight_rows(replica.life),
            others_rows=replica.others_rows,
            age_ms=int((self._now_s - replica.heard_s) * 1e3),
            resident=resident,
            free_bytes=replica.load.free_bytes,
            reason=reason,
        )


def _why_replica(own: router_pb2.ReplicaOption, costs_us: Sequence[float]) -> str:
    if own.rows:
        if len(costs_us) == 1:
            return "the only holder"
        if own.cost_us <= min(costs_us):
            return "has it done first"
        return "gets other rows of the call anyway, or the others have more to do by then"
    if own.cost_us > min(costs_us):
        return f"slower by {own.cost_us - min(costs_us):.0f} us"
    return "as good, but another one was drawn, or gets other rows of the call anyway"
