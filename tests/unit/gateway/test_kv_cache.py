"""Room for keys and values: grows in place, within the bound of all."""

import torch

from expertmesh.services.gateway.kv_cache import KeyValueBudget

LIKE = torch.zeros(1, 2, 1, 8)


def test_what_is_there_survives_growth() -> None:
    budget = KeyValueBudget(num_layers=3, max_tokens=100, page_size=4)
    kv = budget.new()
    assert budget.hold(kv, 3, most=50)
    rows = kv.rows(1, 3, LIKE)
    assert [tuple(own.shape) for own in rows] == [(1, 2, 2, 8)] * 6
    for number, own in enumerate(rows):
        own.fill_(number + 1)
    assert budget.hold(kv, 5, most=50)
    for number, own in enumerate(kv.rows(1, 3, LIKE)):
        assert bool((own == number + 1).all())


def test_room_doubles_in_whole_pages_up_to_what_can_be_needed() -> None:
    budget = KeyValueBudget(num_layers=1, max_tokens=100, page_size=4)
    kv = budget.new()
    capacities = []
    for num_tokens in range(1, 31):
        assert budget.hold(kv, num_tokens, most=30)
        capacities.append(kv.capacity)
    assert sorted(set(capacities)) == [4, 8, 16, 32]
    assert budget.num_free == 100 - 32


def test_nobody_gets_more_than_there_is() -> None:
    budget = KeyValueBudget(num_layers=1, max_tokens=30, page_size=8)
    first, second = budget.new(), budget.new()
    assert budget.hold(first, 17, most=17)
    assert not budget.hold(second, 7, most=7)
    assert budget.hold(second, 6, most=6)  # the last page is not whole
    budget.free(first)
    assert budget.hold(second, 30, most=30)
    budget.free(second)
    assert budget.num_free == 30
