"""What was used together lately says what is needed next."""

from expertmesh.experts.prefetch import CoActivation
from expertmesh.experts.residency import ExpertKey


def test_nothing_is_known_at_first() -> None:
    together = CoActivation([1, 4])
    together.observe(1, [0, 2])
    assert together.predict(1, [0, 2]) == []


def test_what_followed_is_expected_again() -> None:
    together = CoActivation([1, 4])
    for _ in range(3):
        together.observe(1, [0, 2])
        together.observe(4, [5])
    assert together.predict(1, [2]) == [ExpertKey(4, 5)]
    assert together.predict(1, [7]) == [], "was never seen"
    assert together.predict(4, [5]) == [ExpertKey(1, 0), ExpertKey(1, 2)], "of the next token"


def test_the_likeliest_comes_first_and_the_rare_is_left_out() -> None:
    together = CoActivation([0, 1])
    for round_number in range(20):
        together.observe(0, [3])
        follows = [6] if round_number % 2 else [6, 7]
        together.observe(1, [*follows, 2] if round_number == 0 else follows)
    assert together.predict(0, [3]) == [ExpertKey(1, 6), ExpertKey(1, 7)]


def test_old_habits_fade() -> None:
    together = CoActivation([0, 1])
    for expert in [4] * 100 + [5] * 100:
        together.observe(0, [0])
        together.observe(1, [expert])
    assert together.predict(0, [0]) == [ExpertKey(1, 5)]


def test_a_batch_that_follows_none_of_the_layer_before_teaches_nothing() -> None:
    together = CoActivation([0, 1, 2])
    for _ in range(3):
        together.observe(0, [0])
        together.observe(2, [1])
    assert together.predict(0, [0]) == []
    assert together.predict(1, [1]) == []


def test_callers_may_alternate() -> None:
    together = CoActivation(range(8))
    for step in range(40):
        together.observe(step % 8, [1])
        together.observe((step + 3) % 8, [2])
    assert together.predict(5, [1]) == [ExpertKey(6, 1)]
    assert together.predict(5, [2]) == [ExpertKey(6, 2)]


def test_what_is_long_ago_is_not_followed() -> None:
    together = CoActivation(range(8))
    together.observe(0, [1])
    for layer in (3, 4, 5, 6):
        together.observe(layer, [1])
    together.observe(1, [1])
    assert together.predict(0, [1]) == []


def test_one_layer_follows_itself() -> None:
    together = CoActivation([3])
    together.observe(3, [1])
    together.observe(3, [2])
    assert together.predict(3, [1]) == [ExpertKey(3, 2)]
