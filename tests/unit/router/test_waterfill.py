"""Sharing a call's rows out over replicas: whole where it can be, split where it pays."""

from collections import Counter
from collections.abc import Mapping
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.router.pools import Costs, Standing
from expertmesh.router.waterfill import Shares, share_out

REPLICAS = "abcd"


def share(
    rows: Mapping[int, int], holders: Mapping[int, str], *, seed: int = 0, **standings: Standing
) -> Shares:
    """`share_out` over replicas of one letter; those not named are idle and take 100 us a row."""
    idle = Standing(Costs(row_us=100.0))
    return share_out(rows, holders, lambda name: standings.get(name, idle), Random(seed))


def rows_of(shares: Shares) -> Counter[str]:
    """Rows of each replica."""
    found: Counter[str] = Counter()
    for own in shares.values():
        for name, rows in own:
            found[name] += rows
    return found


STANDINGS = st.builds(
    Standing,
    costs=st.builds(
        Costs,
        batch_us=st.floats(0, 1e4),
        expert_us=st.floats(0, 1e4),
        row_us=st.floats(0.01, 1e4),
        load_us=st.floats(0, 1e5),
    ),
    ready_us=st.floats(0, 1e6),
    resident=st.none() | st.frozensets(st.integers(0, 5)),
    is_fresh=st.booleans(),
    may_split=st.booleans(),
)


@settings(deadline=None)
@given(
    st.dictionaries(st.integers(0, 5), st.integers(1, 500), min_size=1),
    st.lists(st.sets(st.sampled_from(REPLICAS), min_size=1), min_size=6, max_size=6),
    st.lists(STANDINGS, min_size=4, max_size=4),
    st.integers(0, 9),
)
def test_every_row_goes_to_a_holder_and_none_is_lost(
    rows: dict[int, int], holders: list[set[str]], standings: list[Standing], seed: int
) -> None:
    named = dict(zip(REPLICAS, standings, strict=True))
    able = {expert: "".join(sorted(own)) for expert, own in enumerate(holders)}
    shares = share(rows, able, seed=seed, **named)
    assert list(shares) == list(rows)
    for expert, own in shares.items():
        assert sum(count for _, count in own) == rows[expert]
        assert min(count for _, count in own) > 0
        names = [name for name, _ in own]
        assert len(set(names)) == len(names)
        assert set(names) <= holders[expert]
        if not all(named[name].may_split for name in names):
            assert len(names) == 1


def test_a_replica_half_as_fast_gets_half_the_rows() -> None:
    slow, fast = Standing(Costs(row_us=200.0)), Standing(Costs(row_us=100.0))
    assert rows_of(share({0: 300}, {0: "ab"}, a=slow, b=fast)) == {"a": 100, "b": 200}
    both = rows_of(share({0: 150, 1: 150}, {0: "ab", 1: "ab"}, a=slow, b=fast))
    assert both["b"] == pytest.approx(200, abs=4)


def test_what_a_replica_has_to_do_counts() -> None:
    busy = Standing(Costs(row_us=100.0), ready_us=5000.0)
    assert rows_of(share({0: 150}, {0: "ab"}, a=busy))["b"] == pytest.approx(100, abs=3)
    assert rows_of(share({0: 10}, {0: "ab"}, a=busy)) == {"b": 10}


def test_few_rows_stay_together() -> None:
    quick = dict.fromkeys("abc", Standing(Costs(row_us=30.0)))
    for seed in range(10):
        shares = share({0: 1, 1: 1, 2: 1}, {0: "a", 1: "abc", 2: "abc"}, seed=seed, **quick)
        assert rows_of(shares) == {"a": 3}, "a message costs more than two rows"


def test_an_expert_is_not_split_if_others_take_as_long_anyway() -> None:
    assert share({0: 100, 1: 40}, {0: "a", 1: "bc"})[1] in ([("b", 40)], [("c", 40)])
    assert len(share({0: 10, 1: 40}, {0: "a", 1: "bc"})[1]) == 2


def test_nothing_is_poured_if_that_takes_the_router_longer_than_it_gains() -> None:
    quick = Standing(Costs(row_us=10.0))
    few = dict.fromkeys(range(3), 40)
    shares = share(few, dict.fromkeys(few, "ab"), a=quick, b=quick)
    assert any(len(own) > 1 for own in shares.values()), "200 us for three experts"
    many = dict.fromkeys(range(33), 40)
    shares = share(many, dict.fromkeys(many, "ab"), a=quick, b=quick)
    assert all(len(own) == 1 for own in shares.values()), "200 us for 33"


def test_nothing_is_split_in_deterministic_mode() -> None:
    whole = Standing(Costs(row_us=100.0), may_split=False)
    assert len(share({0: 1000}, {0: "ab"}, a=whole, b=whole)[0]) == 1


def test_weights_that_are_not_on_the_device_cost_their_loading() -> None:
    cold = Standing(Costs(row_us=100.0, load_us=5000.0), resident=frozenset({1}))
    assert rows_of(share({0: 2}, {0: "ab"}, a=cold)) == {"b": 2}
    for seed in range(10):
        warm = share({1: 2}, {1: "ab"}, a=cold, b=Standing(Costs(row_us=101.0)), seed=seed)
        assert rows_of(warm) == {"a": 2}


def test_equals_are_drawn_by_lot() -> None:
    drawn = Counter(share({0: 1}, {0: "abcd"}, seed=seed)[0][0][0] for seed in range(400))
    assert set(drawn) == set(REPLICAS)
    assert min(drawn.values()) > 60


def test_nobody_follows_old_news_to_one_replica() -> None:
    """The others' backlogs are old: of two drawn at random the better one is taken."""
    old = {
        name: Standing(Costs(row_us=100.0), ready_us=busy_us, is_fresh=False)
        for name, busy_us in zip(REPLICAS, (0.0, 1e4, 1e4, 1e4), strict=True)
    }
    drawn = Counter(
        share_out({0: 1}, {0: "abcd"}, old.__getitem__, Random(seed))[0][0][0]
        for seed in range(400)
    )
    assert drawn["a"] == pytest.approx(200, abs=40), "in half of all pairs"
    fresh = {name: Standing(own.costs, own.ready_us) for name, own in old.items()}
    assert share_out({0: 1}, {0: "abcd"}, fresh.__getitem__, Random(0)) == {0: [("a", 1)]}


def test_four_routers_with_the_same_old_news_do_not_herd() -> None:
    """Each sends 50 calls knowing only its own; with one choice for all, one replica got 200."""
    standing = Standing(Costs(row_us=100.0), is_fresh=False)
    total: Counter[str] = Counter()
    for router in range(4):
        random, own = Random(router), Counter[str]()
        for _ in range(50):
            now = {
                name: Standing(standing.costs, own[name] * 100.0, is_fresh=False)
                for name in REPLICAS
            }
            own += rows_of(share_out({0: 4}, {0: REPLICAS}, now.__getitem__, random))
        total += own
    assert max(total.values()) / (sum(total.values()) / 4) < 1.15
