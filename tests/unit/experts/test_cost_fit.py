"""What a batch costs, learned from batches."""

from random import Random

import pytest

from expertmesh.experts.cost_fit import BatchCost, CostFit


def batches(fit: CostFit, count: int, slower: float = 1.0, seed: int = 0) -> CostFit:
    """After batches of 50 us, 30 us an expert and 4 us a row, give or take a fifth."""
    random = Random(seed)
    for _ in range(count):
        rows = random.choice([1, 2, 8, 64, 512])
        experts = min(rows, random.choice([1, 2, 4]))
        noise = random.lognormvariate(0, 0.2)
        fit.observe(experts, rows, slower * (50 + 30 * experts + 4 * rows) * noise)
    return fit


def test_nothing_is_known_at_first() -> None:
    assert CostFit().cost == BatchCost(0, 0, 0)


def test_the_three_costs_are_told_apart() -> None:
    assert batches(CostFit(), 640).cost == pytest.approx((50, 30, 4), rel=0.25)


def test_a_device_that_slows_down_is_soon_known() -> None:
    fit = batches(batches(CostFit(), 640), 320, slower=3)
    assert fit.cost == pytest.approx((150, 90, 12), rel=0.35)


def test_batches_of_one_size_are_priced_right_as_a_whole() -> None:
    fit = CostFit()
    for _ in range(64):
        fit.observe(2, 2, 80.0)
    cost = fit.cost
    assert cost.batch_us + 2 * cost.expert_us + 2 * cost.row_us == pytest.approx(80, rel=0.01)
    assert min(cost) >= 0


def test_one_batch_is_enough_for_a_guess() -> None:
    fit = CostFit()
    fit.observe(1, 10, 100.0)
    cost = fit.cost
    assert cost.batch_us + cost.expert_us + 10 * cost.row_us == pytest.approx(100, rel=0.01)


def test_costs_never_get_negative() -> None:
    fit = CostFit()
    for rows in (1, 2, 3, 4) * 20:
        fit.observe(1, rows, 100.0 / rows)  # more rows, less time: noise
    assert min(fit.cost) >= 0


def test_a_clock_that_stands_still_says_nothing() -> None:
    fit = CostFit()
    fit.observe(1, 1, 0.0)
    assert fit.cost == BatchCost()
