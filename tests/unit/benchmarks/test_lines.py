"""How straight a curve is: lines and chords through its points."""

import pytest
from benchmarks.harness.lines import Growth, fit, weigh

XS = (1, 2, 4, 8, 16, 32)


def growth(costs: list[float]) -> Growth:
    return Growth(XS, costs)


def test_a_line_is_found_again() -> None:
    line = fit(XS, [3 + 0.5 * x for x in XS])

    assert (line.fixed, line.slope) == pytest.approx((3, 0.5))
    assert line.at(100) == pytest.approx(53)


def test_a_small_cost_counts_as_much_as_a_large_one() -> None:
    assert fit((1, 1000), (1.0, 1000.0)).at(1) == pytest.approx(1)


@pytest.mark.parametrize("costs", [(3.0, 2.0), (5.0,)], ids=["falling", "one point"])
def test_a_line_does_not_fall(costs: tuple[float, ...]) -> None:
    line = fit(XS[: len(costs)], costs)

    assert line.slope == 0
    assert min(costs) <= line.fixed <= max(costs)


def test_a_line_does_not_start_below_zero() -> None:
    assert fit((1, 2, 3), (1, 4, 9)).fixed == 0


def test_weigh_tells_terms_apart() -> None:
    terms = [(1, 0), (1, 5), (2, 1), (4, 8)]

    assert weigh(terms, [2 * a + 3 * b for a, b in terms]) == pytest.approx([2, 3])


def test_a_line_is_linear() -> None:
    own = growth([3 + 0.5 * x for x in XS])

    assert own.over_line.ratio == pytest.approx(1)
    assert own.under_chord.ratio == pytest.approx(1)


def test_a_cost_that_bends_down_is_better_than_linear() -> None:
    own = growth([1 + x**0.5 for x in XS])

    assert own.over_line.ratio < 1
    assert own.under_chord.ratio == 1


def test_a_cost_that_grows_faster_than_x_fails_both() -> None:
    own = growth([x**1.3 for x in XS])

    assert own.over_line.ratio > 1.15
    assert own.under_chord.ratio > 1.15


def test_a_slow_bend_beside_a_large_fixed_cost_is_over_the_line() -> None:
    own = growth([10 + 0.0025 * x * x for x in XS])

    assert own.over_line.x == 32
    assert own.over_line.ratio == pytest.approx(1.21, abs=0.01)
    assert own.under_chord.ratio < 1.15


def test_a_late_bend_after_dear_first_units_is_under_a_chord() -> None:
    own = growth([1, 2, 2.6, 3, 3.4, 8])  # the chord from 4 to 32 is at 4.914 over 16

    assert own.over_line.ratio < 1
    assert own.under_chord.x == 16
    assert own.under_chord.ratio == pytest.approx(4.914 / 3.4, abs=0.001)


def test_a_bend_in_the_middle_counts_too() -> None:
    assert growth([1, 1.1, 1.3, 1.7, 4, 4.1]).over_line.x == 16


def test_points_before_the_cheapest_are_left_out() -> None:
    own = growth([5, 3, 4, 6, 10, 18])

    assert own.fitted == range(1, 4)
    assert own.line.at(32) == pytest.approx(18)
    assert own.under_chord.ratio == pytest.approx(1)


@pytest.mark.parametrize("cheapest", [4, 5])
def test_a_cost_that_only_falls(cheapest: int) -> None:
    costs = [9.0, 8.0, 7.0, 6.0, 5.0, 5.5 if cheapest == 4 else 4.0]

    assert growth(costs).over_line.ratio == pytest.approx(costs[-1] / min(costs))
