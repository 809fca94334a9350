"""Popularity over windows, and how much of it is chance."""

from random import Random

import pytest

from expertmesh.router.popularity import LayerPopularity, Popularity

EXPERTS, REPLICAS = 64, 8


def windows(count: int, noise: float, random: Random) -> list[list[float]]:
    return [[1000 * random.gauss(1, noise) for _ in range(EXPERTS)] for _ in range(count)]


def test_the_mean_forgets_by_half() -> None:
    popularity = LayerPopularity(2, half_life_windows=2)
    for _ in range(50):
        popularity.observe([100.0, 0.0])
    for _ in range(2):
        popularity.observe([0.0, 100.0])
    assert popularity.rows == pytest.approx([50.0, 50.0], abs=0.01)


def test_the_first_windows_count_alike() -> None:
    popularity = LayerPopularity(1, half_life_windows=100)
    for rows in (10.0, 20.0, 60.0):
        popularity.observe([rows])
    assert popularity.rows == pytest.approx([30.0])


def test_noise_is_what_chance_makes_of_equal_loads() -> None:
    """The highest replica's share over the mean, over many draws, is about what is promised."""
    random, ratios, promised = Random(5), [], []
    for _ in range(40):
        popularity = LayerPopularity(EXPERTS, half_life_windows=4)
        for rows in windows(30, 0.2, random):
            popularity.observe(rows)
        promised.append(popularity.noise(REPLICAS))
        each = EXPERTS // REPLICAS
        level = [sum(popularity.rows[g * each : (g + 1) * each]) for g in range(REPLICAS)]
        ratios.append(max(level) / (sum(level) / REPLICAS) - 1)
    assert 0.5 < (sum(ratios) / len(ratios)) / (sum(promised) / len(promised)) < 1.2


def test_a_change_is_soon_no_noise() -> None:
    popularity = LayerPopularity(EXPERTS, half_life_windows=2)
    for rows in [[1000.0] * EXPERTS] * 10 + [[9000.0] + [1000.0] * (EXPERTS - 1)] * 24:
        popularity.observe(rows)
    steady = LayerPopularity(EXPERTS, half_life_windows=2)
    for _ in range(30):
        steady.observe([9000.0] + [1000.0] * (EXPERTS - 1))
    assert popularity.noise(REPLICAS) < 1.2 * steady.noise(REPLICAS)


def test_few_rows_are_noisy() -> None:
    few, many = LayerPopularity(EXPERTS, 4), LayerPopularity(EXPERTS, 4)
    few.observe([1.0] * EXPERTS)
    many.observe([10_000.0] * EXPERTS)
    assert few.noise(REPLICAS) == pytest.approx(100 * many.noise(REPLICAS))


def test_windows_without_rows_say_nothing() -> None:
    popularity = Popularity({0: 2, 3: 2}, 1)
    popularity.observe({0: [1.0, 3.0], 3: [0.0, 0.0]})
    popularity.observe({0: [0.0, 0.0]})
    assert popularity.known() == {0: [1.0, 3.0]}
    assert popularity.layers[3].noise(4) == 0
