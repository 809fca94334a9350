"""Who runs, what goes into a forward, and who gives way when keys and values have no room."""

from dataclasses import replace
from typing import Any

from expertmesh.runtime.missing_experts import DegradedMass
from expertmesh.services.gateway.engine_config import EngineConfig
from expertmesh.services.gateway.kv_cache import KeyValueBudget
from expertmesh.services.gateway.sampling import GenerationRequest
from expertmesh.services.gateway.schedule import Generation, Schedule
from expertmesh.services.gateway.token_stream import TokenStream

CONFIG = EngineConfig(max_batch_tokens=10, kv_cache_tokens=64, page_size=4, max_running=3)


class Bench:
    """A schedule, and forwards that are done as soon as they are planned."""

    def __init__(self, **changes: Any) -> None:
        self.config = replace(CONFIG, **changes)
        self.budget = KeyValueBudget(1, self.config.kv_cache_tokens, self.config.page_size)
        self.schedule = Schedule(self.config, self.budget)

    def add(self, num_prompt: int, num_new: int = 20) -> Generation:
        request = GenerationRequest((1,) * num_prompt, num_new)
        added = Generation(request, DegradedMass(), TokenStream(), self.budget.new())
        self.schedule.add(added)
        return added

    def step(self) -> list[tuple[Generation, int]]:
        """The shares of a forward."""
        shares = self.schedule.next_batch()
        planned = [(share.generation, share.length) for share in shares]
        for share in shares:
            is_last = share.is_last
            share.generation.num_computed += share.length
            if is_last and share.generation.add(7):
                self.schedule.end(share.generation)
        return planned


def test_prompts_are_cut_where_a_forward_is_full_and_answers_go_first() -> None:
    bench = Bench()
    first, second, third = bench.add(4), bench.add(15), bench.add(2)
    assert bench.step() == [(first, 4), (second, 6)]
    assert bench.step() == [(first, 1), (second, 9)]
    assert bench.step() == [(first, 1), (second, 1), (third, 2)]
    assert bench.step() == [(first, 1), (second, 1), (third, 1)]


def test_no_more_run_than_may() -> None:
    bench = Bench(max_running=1)
    first, second = bench.add(2, num_new=2), bench.add(3)
    assert bench.step() == [(first, 2)]
    assert bench.step() == [(first, 1)]
    assert bench.step() == [(second, 3)]


def test_nobody_computes_what_nobody_waits_for() -> None:
    bench = Bench(max_running=1)
    first, second = bench.add(2), bench.add(3)
    bench.step()
    first.is_cancelled = second.is_cancelled = True
    assert bench.step() == []
    assert list(bench.schedule) == []
    assert bench.budget.num_free == CONFIG.kv_cache_tokens


def test_the_youngest_gives_way_and_begins_again_with_its_tokens() -> None:
    bench = Bench(kv_cache_tokens=16)
    first, second = bench.add(6), bench.add(4)
    while any(own is second for own, _ in bench.step()):
        pass
    num_tokens = len(second.tokens)
    assert num_tokens > 4
    assert list(bench.schedule) == [first, second]
    first.is_cancelled = True
    assert bench.step() == [(second, num_tokens)]


def test_all_of_it_is_free_in_the_end() -> None:
    bench = Bench(kv_cache_tokens=30)
    for length in (5, 9, 1, 12):
        bench.add(length, num_new=10)
    while bench.step():
        pass
    assert bench.budget.num_free == 30
