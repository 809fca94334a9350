"""What the loader loads before anybody asks: early when right, given up when wrong."""

import threading

from tests.unit.experts.watched_loader import (
    KEYS,
    TIMEOUT_S,
    A,
    B,
    C,
    D,
    Source,
    loading,
    read,
    wait_until,
)


def test_a_right_guess_is_a_hit() -> None:
    source = Source()
    with loading(3, source) as loader:
        for _ in loader.use([A], then=[B]):
            pass
        wait_until(lambda: loader.are_resident([B]))
        read(loader, [B])
        assert (loader.counts.hits, loader.counts.prefetches) == (1, 1)


def test_a_wrong_guess_is_cancelled() -> None:
    source = Source()
    source.close(B)
    with loading(2, source) as loader:
        for _ in loader.use([A], then=[B, D]):
            pass
        assert source.begun[B].wait(TIMEOUT_S)
        read(loader, [C])
        assert loader.counts.cancelled == 1
        assert source.filled == [A, C], "D was not even begun"
        assert not loader.are_resident([B])


def test_a_guess_asked_for_while_it_loads_goes_on() -> None:
    source = Source()
    gate = source.close(B)
    with loading(2, source) as loader:
        for _ in loader.use([A], then=[B]):
            pass
        assert source.begun[B].wait(TIMEOUT_S)
        asked = threading.Thread(target=read, args=(loader, [B]))
        asked.start()
        wait_until(lambda: loader.counts.misses == 2)
        gate.set()
        asked.join(TIMEOUT_S)
        assert source.filled == [A, B]
        assert loader.counts.cancelled == 0


def test_a_guess_takes_nothing_away_that_is_wanted() -> None:
    with loading(2) as loader:
        read(loader, [A, B])
        for _ in loader.use([A, B], then=[C]):
            pass
        assert loader.are_resident([A, B])
        assert loader.counts.prefetches == 0


def test_a_guess_that_fails_is_not_tried_for_ever() -> None:
    source = Source()
    source.broken = {B}
    with loading(3, source) as loader:
        for _ in loader.use([A], then=[B, C]):
            pass
        wait_until(lambda: loader.are_resident([C]))
        assert loader.counts.failed == 1
        source.broken = set()
        for _ in loader.use([A], then=[B]):
            pass
        wait_until(lambda: loader.are_resident([B]))
        read(loader, [B])


def test_a_guess_for_another_callers_next_layer_goes_on() -> None:
    source = Source()
    other = KEYS[4]
    gate = source.close(other)
    with loading(3, source) as loader:
        read(loader, [A, B])
        for _ in loader.use([A], then=[other]):
            pass
        assert source.begun[other].wait(TIMEOUT_S)
        read(loader, [B])
        gate.set()
        wait_until(lambda: loader.are_resident([other]))
        assert loader.counts.cancelled == 0


def test_a_guess_delays_nobody() -> None:
    source = Source()
    other = KEYS[4]
    source.close(other)
    with loading(3, source) as loader:
        for _ in loader.use([A], then=[other]):
            pass
        assert source.begun[other].wait(TIMEOUT_S)
        read(loader, [B])
        assert loader.counts.cancelled == 1
        source.gates[other].set()
        read(loader, [other])


def test_a_guess_takes_no_other_guess_away() -> None:
    with loading(3) as loader:
        for _ in range(3):
            read(loader, [D])
        for _ in loader.use([A], then=[B, C]):
            pass
        wait_until(lambda: loader.are_resident([B, C]))
