"""The engine for long times and large meshes: steps of time, layer calls planned now and then.

Once in a while, and whenever the mesh or the popularity has changed or forwards have another size,
calls to some layers are drawn and go through the router's own code. Until the next time, every
forward is taken to be like them: `forward.py` says what it takes, `progress.py` what becomes of the
requests.
"""

import math
from collections import Counter
from collections.abc import Callable

from expertmesh.router.waterfill import Shares
from expertmesh.runtime.errors import ExpertUnavailable
from expertmesh.services.simulator.fleet import VirtualReplica
from expertmesh.services.simulator.forward import PlannedForward
from expertmesh.services.simulator.metering import ForwardMeter
from expertmesh.services.simulator.outcome import Outcome, Series
from expertmesh.services.simulator.progress import Progress
from expertmesh.services.simulator.routing import load_of
from expertmesh.services.simulator.scaler import Scaler
from expertmesh.services.simulator.world import World, first_replicas

_ROUNDS = 2
_SIZES = 4
"""Forwards are planned with a power of this many tokens."""
_LOOKS = 1000
"""Moments of the series."""
_PATIENCE_S = 3600.0
"""So long after the last arrival it is over, whatever is still under way."""
_ANSWERED_S = 0.005
"""From a planned call to the news that its answers bring, by the router's clock."""


def run_windows(world: World, progress: Callable[[float], None] = lambda frac: None) -> Outcome:
    """Simulate.

    Args:
        progress: told from time to time which part is done, 0 to 1.
    """
    return _Windows(world).run(progress)


class _Windows:
    def __init__(self, world: World) -> None:
        scenario, model = world.scenario, world.scenario.model
        self._world = world
        self._fleet = world.fleet
        self._router = world.routers[0]
        self._requests = Progress(world.arrivals)
        sees_gateways = scenario.scaling.sees == "gateways"
        self._meter = ForwardMeter(world.fleet, model.top_k * model.layers, sees_gateways)
        self._scaler = Scaler(scenario.scaling, world.fleet, self._queued_rows)
        self._sampling = scenario.sampling
        self._token_s = scenario.mesh.costs.layer_token_us / 1e6
        self._around_s = (scenario.mesh.costs.transport_us + scenario.mesh.costs.layer_us) / 1e6
        self._gateways = scenario.mesh.gateways
        self._budget = float(scenario.mesh.forward_tokens)
        self._series = Series()
        self._planned: dict[int, PlannedForward] = {}
        """By the logarithm of their tokens."""
        self._planned_s = self._phase = -math.inf
        self._clock_s = 0.0
        """Of the router: it goes on with each planned call."""
        self._calls = 0
        self._imbalance = 0.0
        world.fleet.on_change = self._on_change
        for group, count in enumerate(first_replicas(scenario)):
            for _ in range(count):
                world.fleet.add(group, 0.0, at_once=True)

    def _on_change(self, replica: VirtualReplica) -> None:
        self._planned.clear()
        self._router.hear(replica, self._clock_s)

    def run(self, progress: Callable[[float], None]) -> Outcome:
        """See `run_windows`."""
        step_s, length_s = self._sampling.window_s, self._world.arrivals.duration_s
        every = max(1, round(length_s / step_s / _LOOKS))
        number, now_s = 0, 0.0
        while now_s < length_s or not self._requests.is_done:
            if now_s > length_s + _PATIENCE_S:
                break
            if number % every == 0:
                waiting = self._requests.waiting_tokens
                self._series.look(now_s, self._fleet, waiting, self._requests.tokens)
                progress(min(1.0, now_s / length_s) if length_s else 1.0)
            number += 1
            self._step(now_s, number * step_s)
            now_s = number * step_s
        self._meter.flush()
        return self._outcome(now_s)

    def _step(self, begin_s: float, end_s: float) -> None:
        self._world.advance(begin_s)
        self._meter.prompts(self._requests.arrive(end_s))
        is_paused = any(own.paused_until_s > begin_s for own in self._world.paused)
        if (self._requests.active or self._requests.waiting_tokens) and not is_paused:
            try:
                self._compute(begin_s, end_s - begin_s)
            except ExpertUnavailable:
                self._requests.fail(end_s)
        if end_s >= self._scaler.next_s:
            self._meter.flush()
            self._scaler.look(end_s)

    def _compute(self, begin_s: float, step_s: float) -> None:
        requests, gateways = self._requests, self._gateways
        waiting, active = requests.waiting_tokens, requests.active
        if active:  # forward after forward; prompts come in as they arrive
            going = min(gateways, active + (waiting > 0))
            answers, room = active / going, max(0.0, self._budget - active / going)
            prompts = min(room, waiting / going)
            for _ in range(_ROUNDS):
                forward_s = self._forward_s(begin_s, answers + prompts, going)
                forwards = going * step_s / forward_s
                prompts = min(room, waiting / forwards)
        else:  # whole prompts, and then nothing
            answers, prompts = 0.0, min(self._budget, waiting)
            going = min(gateways, math.ceil(waiting / prompts))
            forward_s = self._forward_s(begin_s, prompts, going)
            forwards = min(going * step_s / forward_s, waiting / prompts)
        computed = min(waiting, forwards * prompts)
        of_each = forwards / going if active else 0.0
        answered = requests.go_on(begin_s, step_s, of_each, computed, forward_s)
        self._account(begin_s, forwards, going, (computed, answered), forward_s)

    def _account(
        self,
        now_s: float,
        forwards: float,
        going: float,
        tokens: tuple[float, float],
        forward_s: float,
    ) -> None:
        """What replicas did, and how long rows waited for them."""
        size = max(1.0, sum(tokens) / forwards)
        planned, around_s = self._planned_for(now_s, size), self._around(size)
        wait_s = planned.wait_s(size, around_s, going / self._gateways)
        at_replicas_s = forward_s / self._world.scenario.model.layers - around_s
        waiting = forwards * min(1.0, wait_s / at_replicas_s)
        self._meter.forwards(planned, forwards, waiting, *tokens)
        self._meter.waited(sum(tokens), wait_s)

    def _around(self, num_tokens: float) -> float:
        return self._around_s + self._token_s * num_tokens

    def _forward_s(self, now_s: float, num_tokens: float, going: float) -> float:
        planned, share = self._planned_for(now_s, num_tokens), going / self._gateways
        return planned.forward_s(num_tokens, self._around(num_tokens), share)

    def _planned_for(self, now_s: float, num_tokens: float) -> PlannedForward:
        """A planned forward of about this size, made anew if it does not say how things are."""
        phase = self._world.popularity.phase(now_s)
        if now_s - self._planned_s >= self._sampling.every_s or phase != self._phase:
            self._planned_s, self._phase = now_s, phase
            self._planned.clear()
        size = max(0, round(math.log(max(1.0, num_tokens), _SIZES)))
        planned = self._planned.get(size)
        if planned is None:
            planned = self._planned[size] = self._planned_anew(now_s, _SIZES**size)
        return planned

    def _planned_anew(self, now_s: float, num_tokens: int) -> PlannedForward:
        """Calls of several gateways at the same time, to one layer after the other."""
        world = self._world
        num_calls = min(self._gateways, self._sampling.forwards)
        calls = []
        for layer in world.layers:
            own: list[Shares] = []
            for _ in range(num_calls):
                rows = world.rows(layer, num_tokens, now_s)
                own.append(self._router.share(layer, rows, self._clock_s))
                self._send(own[-1])
            calls.append(own)
            self._answer(own)
        replicas = [
            own for group in range(world.fleet.num_groups) for own in world.fleet.ready(group)
        ]
        planned = PlannedForward(num_tokens, calls, replicas, self._gateways, world.layer_weight)
        self._calls += len(calls) * num_calls
        self._imbalance += planned.imbalance() * len(calls) * num_calls
        return planned

    def _send(self, shares: Shares) -> None:
        for parts in shares.values():
            for name, count in parts:
                self._router.sent(name, count)

    def _answer(self, calls: list[Shares]) -> None:
        """All that is in flight is answered, before the next layer is planned."""
        rows: Counter[str] = Counter()
        for shares in calls:
            for parts in shares.values():
                rows.update(dict(parts))
        self._clock_s += _ANSWERED_S
        for replica in self._fleet:
            if replica.name in rows:
                load = load_of(replica)
                self._router.answered(replica, rows[replica.name], load, self._clock_s)

    def _queued_rows(self, group: int) -> float:
        return self._meter.queued_rows(group, self._requests.waiting_tokens)

    def _outcome(self, end_s: float) -> Outcome:
        requests, arrivals = self._requests, self._world.arrivals
        return Outcome(
            arrivals=arrivals,
            ttft_s=requests.first_s - arrivals.times_s,
            latency_s=requests.last_s() - arrivals.times_s,
            series=self._series,
            gpu_s=self._fleet.gpu_seconds(end_s),
            end_s=end_s,
            tokens=requests.tokens,
            rows=self._fleet.computed_rows(),
            planned_calls=self._calls,
            imbalance=self._imbalance / self._calls if self._calls else 1.0,
            changes=self._scaler.changes,
            lost=self._fleet.lost,
        )
