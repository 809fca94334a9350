"""A virtual gateway: requests batched into forwards, their layer calls made one by one."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from expertmesh.runtime.errors import ExpertUnavailable
from expertmesh.services.simulator.clock import Clock
from expertmesh.services.simulator.routing import VirtualRouter
from expertmesh.services.simulator.station import Shipment, Station
from expertmesh.services.simulator.world import World
from expertmesh.v1 import control_pb2


@dataclass(eq=False, slots=True)
class Request:
    """A request that has come and not been answered in full."""

    number: int
    prompt_left: int
    answer_left: int
    """Tokens."""


@dataclass(eq=False)
class Gateway:
    """Forward after forward for its requests.

    Args:
        stations: of the replicas, by name.
        on_token: told a request that has got its first or its last token.
        on_failed: told a request whose forward failed.
    """

    world: World
    router: VirtualRouter
    stations: Mapping[str, Station]
    clock: Clock
    on_token: Callable[[Request], None]
    on_failed: Callable[[Request], None]
    active: list[Request] = field(default_factory=list)
    waiting: deque[Request] = field(default_factory=deque)
    tokens: int = 0
    """Passed through the model."""
    calls: int = 0

    def __post_init__(self) -> None:
        mesh, weight = self.world.scenario.mesh, self.world.layer_weight
        self._budget = mesh.forward_tokens
        self._way_s = weight * mesh.costs.transport_us / 2e6
        self._layer_s = weight * mesh.costs.layer_us / 1e6
        self._token_s = weight * mesh.costs.layer_token_us / 1e6
        self._prompts: list[tuple[Request, int]] = []
        self._num_tokens = self._place = self._pending = 0
        self._has_failed = False

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that have not been computed."""
        return sum(request.prompt_left for request in self.waiting)

    @property
    def load(self) -> int:
        """By which gateways are compared: tokens to be computed."""
        return self.waiting_tokens + sum(request.answer_left for request in self.active)

    def come(self, request: Request) -> None:
        """A request arrives."""
        self.waiting.append(request)
        if not self._num_tokens:
            self._begin()

    def _begin(self) -> None:
        """The next forward: a token of each answer under way, then prompts while there is room."""
        room = self._budget - len(self.active)
        self._prompts = []
        for request in self.waiting:
            if room <= 0:
                break
            self._prompts.append((request, min(room, request.prompt_left)))
            room -= self._prompts[-1][1]
        self._num_tokens = len(self.active) + sum(count for _, count in self._prompts)
        self._place, self._has_failed = 0, False
        if self._num_tokens:
            self._call()

    def _call(self) -> None:
        layer, now_s = self.world.layers[self._place], self.clock.now_s
        self.calls += 1
        try:
            self._ship(layer, self.world.rows(layer, self._num_tokens, now_s))
        except ExpertUnavailable:
            self._fail()

    def _ship(self, layer: int, rows: Mapping[int, int]) -> None:
        parts: dict[str, dict[int, int]] = {}
        for expert, own in self.router.share(layer, rows, self.clock.now_s).items():
            for name, count in own:
                parts.setdefault(name, {})[expert] = count
        self._pending += len(parts)
        for name, experts in parts.items():
            self._send(self.stations[name], layer, experts)

    def _send(self, station: Station, layer: int, experts: Mapping[int, int]) -> None:
        shipment = Shipment(layer, experts, self._settle, sum(experts.values()))
        self.router.sent(station.replica.name, shipment.num_rows)
        self.clock.after(self._way_s, lambda: station.arrive(shipment))

    def _settle(self, shipment: Shipment, station: Station, is_answered: bool) -> None:
        if is_answered:
            load = station.load()
            self.clock.after(self._way_s, lambda: self._answered(shipment, station, load))
        else:  # the connection breaks, which is noticed at once
            self.clock.after(0.0, lambda: self._lost(shipment, station))

    def _answered(
        self, shipment: Shipment, station: Station, load: control_pb2.ReplicaLoad
    ) -> None:
        self.router.answered(station.replica, shipment.num_rows, load, self.clock.now_s)
        self._one_less()

    def _lost(self, shipment: Shipment, station: Station) -> None:
        self.router.broken(station.replica)
        try:
            if not self._has_failed:
                self._ship(shipment.layer, shipment.rows)
        except ExpertUnavailable:
            self._has_failed = True
        self._one_less()

    def _one_less(self) -> None:
        self._pending -= 1
        if self._pending:
            return
        if self._has_failed:
            self._fail()
            return
        self._place += 1
        around_s = self._layer_s + self._token_s * self._num_tokens
        is_last = self._place == len(self.world.layers)
        self.clock.after(around_s, self._end if is_last else self._call)

    def _end(self) -> None:
        """Every answer under way has one more token, and prompts that are through have their
        first."""
        self.tokens += self._num_tokens
        before = self.active
        self.active = []
        for request in before:
            self._one_token(request)
        for request, count in self._prompts:
            request.prompt_left -= count
            if not request.prompt_left:
                self.waiting.popleft()
                self.on_token(request)
                self._one_token(request)
        self._begin()

    def _one_token(self, request: Request) -> None:
        request.answer_left -= 1
        if request.answer_left:
            self.active.append(request)
        else:
            self.on_token(request)

    def _fail(self) -> None:
        """An expert has no replica: all requests of the forward fail."""
        for request in [*self.active, *(request for request, _ in self._prompts)]:
            self.on_failed(request)
        self.active = []
        for _ in self._prompts:
            self.waiting.popleft()
        self._num_tokens = 0
        self.clock.after(self._layer_s + 2 * self._way_s, self._begin)
