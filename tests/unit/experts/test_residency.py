"""The accounting of a device: whatever happens, it is never over budget and nothing in use goes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from expertmesh.experts.residency import ExpertKey, Residency

KEYS = [ExpertKey(layer, expert) for layer in range(3) for expert in range(4)]
SIZES = {key: 10 if key.layer < 2 else 25 for key in KEYS}
BUDGET_BYTES = 60
A, B, C, D = KEYS[:4]


def holding(*keys: ExpertKey, budget_bytes: int = 20, half_life: float = 10.0) -> Residency:
    """A device with these experts, of 10 bytes each, loaded in this order."""
    residency = Residency(dict.fromkeys(KEYS, 10), budget_bytes, half_life)
    for key in keys:
        assert residency.start_load(key) == []
        residency.loaded(key)
    return residency


def test_the_least_popular_leaves() -> None:
    residency = holding(A, B)
    for _ in range(2):
        assert residency.use(A, 1.0)
    assert residency.use(B, 2.0), "later, but less often"
    assert residency.start_load(C) == [B]
    assert residency.resident == {A}
    assert residency.loading == {C}


def test_popularity_halves() -> None:
    residency = holding(A, B)
    for _ in range(4):
        residency.use(A, 0.0)
    assert residency.popularity(A, 20.0) == pytest.approx(1.0)
    residency.use(B, 0.0)
    residency.use(B, 20.0)
    assert residency.popularity(B, 20.0) == pytest.approx(1.25)
    assert residency.start_load(C) == [A], "was popular, long ago"


def test_among_equals_the_least_recently_used_leaves() -> None:
    residency = holding(A, B, half_life=float("inf"))
    residency.use(B, 1.0)
    residency.use(A, 2.0)
    assert residency.start_load(C) == [B]


def test_uses_of_what_is_absent_or_loading_are_misses() -> None:
    residency = holding(A)
    assert not residency.use(B, 0.0)
    residency.start_load(B)
    assert not residency.use(B, 0.0)
    residency.loaded(B)
    assert residency.use(B, 0.0)


def test_what_is_pinned_stays() -> None:
    residency = holding(A, B)
    residency.pin(A)
    residency.pin(A)
    assert residency.start_load(C) == [B]
    assert residency.start_load(D) is None, "A is pinned and C is loading"
    residency.unpin(A)
    assert residency.evict_one() is None
    residency.unpin(A)
    assert residency.evict_one(keep=[A]) is None
    assert residency.evict_one() == A
    with pytest.raises(AssertionError, match="is not pinned"):
        residency.unpin(A)


def test_what_is_kept_stays_for_this_load_only() -> None:
    residency = holding(A, B)
    assert residency.start_load(C, keep=[A, B]) is None
    assert residency.start_load(C, keep=[A]) == [B]


def test_a_lower_budget_evicts_what_it_may() -> None:
    residency = holding(A, B, C, D, budget_bytes=40)
    for key in (D, C, B, A):
        residency.use(key, 1.0)
    residency.pin(D)
    assert residency.set_budget(20, keep=(C,)) == [A, B]
    assert residency.set_budget(10, keep=(C,)) == []
    assert residency.used_bytes == 20, "above it for as long as they are needed"
    assert residency.start_load(A) is None
    residency.unpin(D)
    assert sorted(residency.start_load(A) or ()) == [C, D]
    residency.loaded(A)
    assert residency.set_budget(30) == []
    assert residency.start_load(B) == []
    with pytest.raises(AssertionError, match="must hold any one expert"):
        residency.set_budget(9)


def test_the_favourite_is_the_most_popular_that_is_there() -> None:
    residency = holding()
    assert residency.favourite() is None
    residency = holding(A, B)
    residency.use(B, 1.0)
    residency.use(C, 1.0)
    residency.use(C, 1.0)
    assert residency.favourite() == B


def test_a_load_given_up_leaves_nothing() -> None:
    residency = holding(A)
    residency.start_load(B)
    residency.not_loaded(B)
    assert residency.used_bytes == 10
    assert residency.start_load(B) == []


@given(st.integers(0, 24))
def test_a_budget_below_the_largest_expert_is_a_mistake(budget_bytes: int) -> None:
    with pytest.raises(AssertionError, match="any one expert"):
        Residency(SIZES, budget_bytes)


class AnySequence(RuleBasedStateMachine):
    """Every operation in every order, beside a model of what must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency(SIZES, BUDGET_BYTES, 5.0)
        self.now_s = 0.0
        self.pins: list[ExpertKey] = []

    @rule(passed_s=st.floats(0, 10), key=st.sampled_from(KEYS))
    def use(self, passed_s: float, key: ExpertKey) -> None:
        self.now_s += passed_s
        was_resident = key in self.residency.resident
        assert self.residency.use(key, self.now_s) == was_resident

    @rule(key=st.sampled_from(KEYS), keep=st.sets(st.sampled_from(KEYS)))
    def start_load(self, key: ExpertKey, keep: set[ExpertKey]) -> None:
        held = self.residency.resident | self.residency.loading
        if key in held:
            return
        before, used_bytes = set(self.residency.resident), self.residency.used_bytes
        evicted = self.residency.start_load(key, keep)
        stuck_bytes = sum(SIZES[k] for k in held if k not in before - set(self.pins) - keep)
        if evicted is None:
            assert stuck_bytes + SIZES[key] > BUDGET_BYTES, "there was room"
            assert (self.residency.resident, self.residency.used_bytes) == (before, used_bytes)
            return
        assert before - self.residency.resident == set(evicted)
        assert not set(evicted) & (set(self.pins) | keep)

    @precondition(lambda self: self.residency.loading)
    @rule(data=st.data(), there=st.booleans())
    def finish(self, data: st.DataObject, there: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.residency.loading)))
        (self.residency.loaded if there else self.residency.not_loaded)(key)

    @rule(key=st.sampled_from(KEYS))
    def pin(self, key: ExpertKey) -> None:
        self.residency.pin(key)
        self.pins.append(key)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.pins))
        self.pins.remove(key)
        self.residency.unpin(key)

    @rule()
    def evict_one(self) -> None:
        movable = self.residency.resident - set(self.pins)
        popularity = {key: self.residency.popularity(key, self.now_s) for key in movable}
        victim = self.residency.evict_one()
        assert (victim is None) == (not movable)
        if victim:
            assert popularity[victim] == pytest.approx(min(popularity.values()))

    @invariant()
    def adds_up(self) -> None:
        residency = self.residency
        held = residency.resident | residency.loading
        assert not residency.resident & residency.loading
        assert residency.used_bytes == sum(SIZES[key] for key in held)
        assert residency.used_bytes <= BUDGET_BYTES
        assert residency.pinned == set(self.pins)


TestAnySequence = AnySequence.TestCase
