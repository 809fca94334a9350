"""Which requests run, and which of their tokens go into the next forward. Does no I/O."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from expertmesh.runtime.missing_experts import DegradedMass
from expertmesh.services.gateway.engine_config import EngineConfig
from expertmesh.services.gateway.kv_cache import KeyValueBudget, KeyValues
from expertmesh.services.gateway.packed_attention import Part
from expertmesh.services.gateway.sampling import GenerationRequest
from expertmesh.services.gateway.token_stream import TokenStream


@dataclass(eq=False)
class Generation:
    """A request under way."""

    request: GenerationRequest
    degraded: DegradedMass
    stream: TokenStream
    """Belongs to the event loop."""
    kv: KeyValues
    tokens: list[int] = field(default_factory=list)
    """The prompt, and what has been generated."""
    num_computed: int = 0
    """Of the tokens, whose keys and values are there."""
    is_cancelled: bool = False
    """Nobody waits for it any more. Set on the event loop, seen before the next forward."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_computed

    def add(self, token: int) -> bool:
        """The next token; returns whether it is the last."""
        self.tokens.append(token)
        is_full = len(self.tokens) == self.request.num_tokens
        return is_full or token in self.request.eos_ids


@dataclass(frozen=True)
class Share:
    """Of one generation in a forward."""

    generation: Generation
    length: int
    """The first so many of its pending tokens."""

    @property
    def is_last(self) -> bool:
        """Whether a token comes of it."""
        return self.length == self.generation.num_pending

    @property
    def part(self) -> Part:
        return Part(self.generation.kv, self.generation.num_computed, self.length)

    @property
    def tokens(self) -> list[int]:
        first = self.generation.num_computed
        return self.generation.tokens[first : first + self.length]


class Schedule:
    """Generations wait in the order they came; those that run go on until they end.

    If there is no room for the next position of one that runs, the youngest goes back to the head
    of those that wait and is computed anew later: the oldest always gets on.
    """

    def __init__(self, config: EngineConfig, budget: KeyValueBudget) -> None:
        self._config = config
        self._budget = budget
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []

    def __iter__(self) -> Iterator[Generation]:
        yield from self._running
        yield from self._waiting

    def add(self, generation: Generation) -> None:
        self._waiting.append(generation)

    def end(self, generation: Generation) -> None:
        """It needs no more tokens."""
        self._running.remove(generation)
        self._budget.free(generation.kv)

    def clear(self) -> None:
        """All have ended."""
        for generation in [*self._running]:
            self.end(generation)
        self._waiting.clear()

    def next_batch(self) -> list[Share]:
        """The next forward, of `max_batch_tokens` at most; empty if there is nothing to do."""
        self._drop_cancelled()
        self._keep_room()
        self._let_in()
        shares = []
        num_left = self._config.max_batch_tokens
        # who has begun to answer goes on; prompts fill the rest
        for generation in sorted(self._running, key=lambda own: own.num_pending > 1):
            length = min(generation.num_pending, num_left)
            if length:
                shares.append(Share(generation, length))
                num_left -= length
        return shares

    def _drop_cancelled(self) -> None:
        for generation in [own for own in self._running if own.is_cancelled]:
            self.end(generation)
        self._waiting = deque(own for own in self._waiting if not own.is_cancelled)

    def _keep_room(self) -> None:
        for generation in [*self._running]:
            while generation in self._running and not self._hold(generation):
                youngest = self._running[-1]
                self.end(youngest)
                youngest.kv, youngest.num_computed = self._budget.new(), 0
                self._waiting.appendleft(youngest)

    def _let_in(self) -> None:
        while self._waiting and len(self._running) < self._config.max_running:
            if not self._hold(self._waiting[0]):
                return
            self._running.append(self._waiting.popleft())

    def _hold(self, generation: Generation) -> bool:
        """Whether there is room for its tokens."""
        return self._budget.hold(
            generation.kv, len(generation.tokens), most=generation.request.num_tokens
        )
