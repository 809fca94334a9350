"""What the groups of a mesh measure, from forwards that are alike. Pure."""

from expertmesh.services.simulator.fleet import Fleet
from expertmesh.services.simulator.forward import PlannedForward

_WAITS_RISE = 2
"""Rows wait for the busiest group; for others less, by this power of how busy they are."""


class ForwardMeter:
    """Adds up forwards and tells the fleet what they were, when asked to.

    Args:
        rows_per_token: rows of a token in all layers.
        sees_gateways: whether a prompt counts as come when it is at a gateway.
    """

    def __init__(self, fleet: Fleet, rows_per_token: float, sees_gateways: bool) -> None:
        self.share_G = [1 / fleet.num_groups] * fleet.num_groups
        """Share of the rows that goes to each group, as last seen."""
        self._fleet = fleet
        self._rows_per_token = rows_per_token
        self._sees_gateways = sees_gateways
        self._done: dict[PlannedForward, list[float]] = {}
        self._came_tokens = 0.0
        self._waited_s = self._waits = 0.0

    def prompts(self, tokens: float) -> None:
        """Prompts have come to the gateways."""
        if self._sees_gateways:
            self._came_tokens += tokens

    def forwards(
        self,
        planned: PlannedForward,
        forwards: float,
        waiting: float,
        prompts: float,
        answers: float,
    ) -> None:
        """So many forwards have been computed.

        Args:
            planned: what each of them is like.
            forwards, waiting: of all gateways; see `PlannedForward.work`.
            prompts, answers: tokens of all these forwards.
        """
        done = self._done.setdefault(planned, [0.0, 0.0, 0.0])
        done[0] += forwards
        done[1] += waiting
        done[2] += prompts + answers
        self._came_tokens += answers if self._sees_gateways else answers + prompts

    def waited(self, tokens: float, wait_s: float) -> None:
        """So many tokens waited so long before their rows were computed."""
        self._waits += tokens
        self._waited_s += tokens * wait_s

    def queued_rows(self, group: int, waiting_tokens: float) -> float:
        """Rows of a group that wait at gateways."""
        if not self._sees_gateways:
            return 0.0
        return waiting_tokens * self._rows_per_token * self.share_G[group]

    def flush(self) -> None:
        """Tell replicas and groups what they have done."""
        meters = self._fleet.meters
        rows_G = [0.0] * len(meters)
        for planned, done in self._done.items():
            rows_N, busy_N = planned.work(*done)
            for replica, rows, busy_s in zip(
                planned.replicas, rows_N.tolist(), busy_N.tolist(), strict=True
            ):
                replica.rows += rows
                replica.busy_s += busy_s
                rows_G[replica.group] += rows
                meters[replica.group].busy_s += busy_s
        if total := sum(rows_G):
            self.share_G = [own / total for own in rows_G]
        wait_s = self._waited_s / self._waits if self._waits else 0.0
        busy = [
            meter.busy_s / max(1, len(self._fleet.ready(own))) for own, meter in enumerate(meters)
        ]
        most = max(busy) or 1.0
        for meter, rows, share, level in zip(meters, rows_G, self.share_G, busy, strict=True):
            meter.done_rows += rows
            meter.started_rows += rows
            meter.waited_row_s += rows * wait_s * (level / most) ** _WAITS_RISE
            meter.came_rows += self._came_tokens * self._rows_per_token * share
        self._done.clear()
        self._came_tokens = self._waited_s = self._waits = 0.0
