"""The loader under threads: no torn weights, nothing over budget, failures told and survived."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
import torch
from tests.unit.experts.watched_loader import (
    KEYS,
    SHAPE,
    SLOT_BYTES,
    TIMEOUT_S,
    WIDE,
    A,
    B,
    C,
    D,
    Source,
    loading,
    read,
    value_of,
)

from expertmesh.experts.stack import allocate
from expertmesh.runtime.errors import ConfigError, Draining, WeightsUnavailable


def test_a_miss_loads_and_a_hit_does_not() -> None:
    source = Source()
    with loading(2, source) as loader:
        read(loader, [A, B])
        assert read(loader, [A, B]) == [[A, B]]
        assert source.filled == [A, B]
        counts = loader.counts
        assert (counts.hits, counts.misses, counts.loads, counts.evictions) == (2, 2, 2, 0)
        assert counts.load_time_us > 0


def test_more_experts_than_slots_come_in_portions() -> None:
    with loading(1) as loader:
        assert read(loader, KEYS) == [[key] for key in KEYS]
        assert loader.counts.evictions == len(KEYS) - 1


def test_what_is_there_is_used_while_the_rest_loads() -> None:
    source = Source()
    with loading(3, source) as loader:
        read(loader, [A])
        gate = source.close(B)
        portions = loader.use([A, B])
        assert next(portions).keys() == {A}
        assert source.begun[B].wait(TIMEOUT_S), "loads while A is in use"
        gate.set()
        assert next(portions).keys() == {B}
        portions.close()


def test_an_expert_in_use_is_not_evicted() -> None:
    with loading(2) as loader:
        held = loader.use([A])
        [stack] = next(held).values()
        for key in (B, C, D, B, C):
            read(loader, [key])
        assert bool((stack.memory == value_of(A)).all())
        held.close()
        read(loader, [B, C])
        assert not loader.are_resident([A])


def test_threads_never_see_torn_weights() -> None:
    """Many readers, few slots, every combination of experts."""
    errors: list[BaseException] = []

    def reader(seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        try:
            for _ in range(60):
                count = int(torch.randint(1, 6, (1,), generator=random))
                chosen = torch.randperm(len(KEYS), generator=random)[:count]
                read(loader, [KEYS[at] for at in chosen])
        except BaseException as error:
            errors.append(error)

    with loading(3) as loader:
        threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors, errors[0]
        assert not any(thread.is_alive() for thread in threads), "deadlock"
        assert loader.counts.evictions > 0


def test_the_budget_changes_while_experts_are_used() -> None:
    """Nobody gets torn weights, nobody waits for ever, and in the end the budget holds."""
    with loading(2) as loader, ThreadPoolExecutor(3) as threads:
        stop = threading.Event()

        def use(seed: int) -> int:
            random, uses = Random(seed), 0
            while not stop.is_set():
                read(loader, random.sample(KEYS, 3))
                uses += 1
            return uses

        counts = [threads.submit(use, seed) for seed in range(3)]
        random = Random(9)
        for _ in range(200):
            loader.set_budget(random.randint(1, 8) * SLOT_BYTES)
            time.sleep(0.001)
        loader.set_budget(None)
        stop.set()
        assert all(count.result() > 0 for count in counts)
        read(loader, KEYS)  # the first loads after a lower budget make room for it


def test_a_budget_below_one_expert_is_refused() -> None:
    with loading(2) as loader:
        with pytest.raises(ConfigError, match="device_memory_bytes: expected at least"):
            loader.set_budget(SLOT_BYTES - 1)
        read(loader, [A, B])
        assert loader.are_resident([A, B]), "it is what it was"


def test_a_failed_load_is_told_and_the_next_may_succeed() -> None:
    source = Source()
    source.broken = {B}
    with loading(2, source) as loader:
        with pytest.raises(WeightsUnavailable, match=r"layer 0, expert 1: .* cut off\.") as caught:
            read(loader, [A, B])
        assert caught.value.fields == {"layer": "0", "expert": "1"}
        assert loader.counts.failed == 1
        read(loader, [A])
        source.broken = set()
        read(loader, [A, B])


def test_where_the_device_has_less_than_the_budget_others_leave() -> None:
    num_allowed = 2
    made: list[int] = []

    def scarce(num_bytes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if len(made) == num_allowed:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made.append(num_bytes)
        return allocate(num_bytes, dtype, device)

    with loading(4, allocate=scarce) as loader:
        read(loader, KEYS)
        read(loader, [A, B, C])
        assert loader.counts.failed == 0
        assert loader.counts.evictions > 0


def test_a_device_without_any_memory_is_a_typed_error() -> None:
    def none(num_bytes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    expected = pytest.raises(WeightsUnavailable, match=r"layer 0, expert 0: .*OutOfMemoryError")
    with loading(4, allocate=none) as loader, expected:
        read(loader, [A])


def test_slots_of_several_sizes_share_a_budget() -> None:
    shapes = {key: WIDE if key.layer else SHAPE for key in KEYS}
    with loading(4, shapes=shapes) as loader:
        for _ in range(3):
            read(loader, KEYS)
            read(loader, KEYS[4:])
            read(loader, KEYS[:4])


def test_who_waits_when_it_closes_is_told() -> None:
    source = Source()
    source.close(A)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            read(loader, [A, B])
        except Draining as error:
            caught.append(error)

    with loading(1, source) as loader:
        thread = threading.Thread(target=wait)
        thread.start()
        assert source.begun[A].wait(TIMEOUT_S)
        closing = threading.Thread(target=loader.close)
        closing.start()
        thread.join(TIMEOUT_S)
        source.gates[A].set()
        closing.join(TIMEOUT_S)
        assert len(caught) == 1
