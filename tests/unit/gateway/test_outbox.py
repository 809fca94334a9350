"""Which tokens wait for others, and for how long."""

from dataclasses import replace
from typing import Any

from expertmesh.runtime.missing_experts import DegradedMass
from expertmesh.services.gateway.kv_cache import KeyValues
from expertmesh.services.gateway.outbox import Outbox, Outcome
from expertmesh.services.gateway.sampling import GenerationRequest
from expertmesh.services.gateway.schedule import Generation
from expertmesh.services.gateway.token_stream import TokenStream

INTERVAL_S = 2.0


class Bench:
    """An outbox with a clock of its own."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.delivered: list[list[int | None]] = []
        self._outbox = Outbox(INTERVAL_S, self._deliver, lambda: self.now_s)

    def _deliver(self, outcomes: list[Outcome]) -> None:
        self.delivered.append([outcome.token for outcome in outcomes])

    def put(self, generation: Generation, token: int, **fields: Any) -> None:
        generation.add(token)
        self._outbox.put([Outcome(generation, token, **fields)])


def generation(**changes: Any) -> Generation:
    request = replace(GenerationRequest((1, 2), 10), **changes)
    return Generation(request, DegradedMass(), TokenStream(), KeyValues(1))


def test_the_first_token_and_the_end_go_at_once() -> None:
    bench, own = Bench(), generation()
    bench.put(own, 5)
    assert bench.delivered == [[5]]
    bench.put(own, 6)
    bench.put(own, 7)
    assert bench.delivered == [[5]]
    bench.put(own, 8, is_last=True)
    assert bench.delivered == [[5], [6, 7, 8]]


def test_others_wait_no_longer_than_the_interval() -> None:
    bench, own = Bench(), generation()
    bench.put(own, 5)
    bench.now_s = INTERVAL_S - 0.5
    bench.put(own, 6)
    bench.now_s = INTERVAL_S
    bench.put(own, 7)
    assert bench.delivered == [[5], [6, 7]]


def test_a_token_that_may_complete_a_stop_string_does_not_wait() -> None:
    bench, own = Bench(), generation(stop=("end",))
    for token in (5, 6):
        bench.put(own, token)
    assert bench.delivered == [[5], [6]]
