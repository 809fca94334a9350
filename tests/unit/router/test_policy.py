"""Power of two choices, counted: the less loaded of two drawn at random, never of all."""

from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random

import pytest

from expertmesh.router.policy import pick_replica

DRAWS = 6000
TOLERANCE_FRAC = 0.03  # more than four standard deviations of a share among DRAWS


def shares(
    holders: Sequence[str],
    backlog_rows: Mapping[str, int],
    contacted: Mapping[str, object] | None = None,
) -> dict[str, float]:
    """How often each replica is picked."""
    random = Random(20240229)
    picked = Counter(
        pick_replica(holders, contacted or {}, backlog_rows.__getitem__, random)
        for _ in range(DRAWS)
    )
    return {name: count / DRAWS for name, count in picked.items()}


def test_the_only_holder_is_taken_whatever_its_load() -> None:
    assert shares(["a"], {"a": 10**9}) == {"a": 1.0}


def test_of_two_the_less_loaded_is_always_taken() -> None:
    assert shares(["a", "b"], {"a": 5, "b": 4}) == {"b": 1.0}


def test_of_many_the_least_loaded_is_not_always_taken() -> None:
    # of n replicas the one with r less loaded ones wins 2 (n - 1 - r) / (n (n - 1)) of the draws
    backlog_rows = {"a": 30, "b": 0, "c": 10, "d": 20}
    found = shares(list(backlog_rows), backlog_rows)
    expected = {"b": 3 / 6, "c": 2 / 6, "d": 1 / 6}
    assert found == pytest.approx(expected, abs=TOLERANCE_FRAC)


def test_equal_loads_share_equally() -> None:
    found = shares(["a", "b", "c"], dict.fromkeys("abc", 7))
    assert found == pytest.approx(dict.fromkeys("abc", 1 / 3), abs=TOLERANCE_FRAC)


def test_a_contacted_replica_saves_a_message() -> None:
    backlog_rows = {"a": 100, "b": 0, "c": 0}
    assert shares(["a", "b", "c"], backlog_rows, contacted={"a": 1, "z": 1}) == {"a": 1.0}


def test_of_several_contacted_replicas_two_are_compared() -> None:
    backlog_rows = {"a": 3, "b": 2, "c": 1, "d": 0}
    found = shares(list("abcd"), backlog_rows, contacted=dict.fromkeys("abc"))
    assert found == pytest.approx({"c": 2 / 3, "b": 1 / 3}, abs=TOLERANCE_FRAC)


def test_equal_seeds_pick_equally() -> None:
    def picks() -> list[str]:
        random = Random(5)
        return [pick_replica("abcd", {}, lambda name: 0, random) for _ in range(50)]

    assert picks() == picks()
    assert len(set(picks())) == 4
