"""Which experts a group holds: ranges as text and back, and everything that is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.experts.assignment import experts_by_layer, format_ids, parse_ids, split_evenly
from expertmesh.runtime.errors import ConfigError

LAYERS = {1: 8, 2: 8, 5: 4}


@settings(deadline=None)
@given(st.sets(st.integers(0, 300), min_size=1))
def test_ids_as_text_and_back(ids: set[int]) -> None:
    assert parse_ids(format_ids(ids)) == tuple(sorted(ids))


@pytest.mark.parametrize(
    ("ids", "text"), [([], ""), ([3], "3"), ([7, 0, 1, 2, 3, 3], "0-3,7"), (range(8), "0-7")]
)
def test_format(ids: list[int], text: str) -> None:
    assert format_ids(ids) == text


@pytest.mark.parametrize(
    ("text", "ids"), [("0-0", (0,)), (" 1 , 0-2 ", (0, 1, 2)), ("7,0-3,2-4", (0, 1, 2, 3, 4, 7))]
)
def test_parse(text: str, ids: tuple[int, ...]) -> None:
    assert parse_ids(text) == ids


@pytest.mark.parametrize("text", ["", ",", "a", "1-", "-1", "1-2-3", "1;2", "1.5", "0x1", "\u00b2"])
def test_other_text_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_ids(text, "experts[3]")
    assert caught.value.message == f'experts[3]: expected ids like "0-3,7", got {text!r}'
    assert caught.value.fields == {"field": "experts[3]"}


def test_a_range_backwards_is_refused() -> None:
    with pytest.raises(ConfigError, match="experts: the range '3-1' runs backwards"):
        parse_ids("0,3-1")


@settings(deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_groups_are_contiguous_complete_and_even(sizes: tuple[int, int]) -> None:
    num_experts, num_groups = sizes
    groups = [parse_ids(text) for text in split_evenly(num_experts, num_groups)]
    assert len(groups) == num_groups
    assert [e for group in groups for e in group] == list(range(num_experts))
    lengths = {len(group) for group in groups}
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("num_experts", "num_groups"), [(8, 0), (8, -1), (8, 9), (1, 2), (0, 1), (0, 0)]
)
def test_fewer_groups_than_one_or_more_than_experts(num_experts: int, num_groups: int) -> None:
    with pytest.raises(ConfigError) as caught:
        split_evenly(num_experts, num_groups)
    assert caught.value.message == (
        f"experts.groups: expected 1 to {num_experts} (the model's experts), got {num_groups}"
    )
    assert caught.value.fields["field"] == "experts.groups"


def test_one_text_for_every_layer() -> None:
    held = {1: (0, 1, 2, 3), 2: (0, 1, 2, 3), 5: (0, 1, 2, 3)}
    assert experts_by_layer("0-3", LAYERS) == held


def test_layers_with_fewer_experts_hold_what_they_have() -> None:
    assert experts_by_layer("2-5", LAYERS) == {1: (2, 3, 4, 5), 2: (2, 3, 4, 5), 5: (2, 3)}
    assert experts_by_layer("4-7", LAYERS) == {1: (4, 5, 6, 7), 2: (4, 5, 6, 7)}


def test_ids_by_layer() -> None:
    assert experts_by_layer({2: "7", 5: "0,3"}, LAYERS) == {2: (7,), 5: (0, 3)}


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ("0-8", "experts[1]: ids are 0 to 7, got '0-8'"),
        ("8", "experts[1]: ids are 0 to 7, got '8'"),
        ({5: "4"}, "experts[5]: ids are 0 to 3, got '4'"),
        ({5: "0-4"}, "experts[5]: ids are 0 to 3, got '0-4'"),
        ({0: "0"}, "experts: layer 0: MoE layers are [1, 2, 5]"),
        ({1: "x"}, "experts[1]: expected ids like \"0-3,7\", got 'x'"),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    experts: str | dict[int, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        experts_by_layer(experts, LAYERS)
    assert caught.value.message == message


def test_the_groups_of_a_mesh_hold_every_expert_once() -> None:
    groups = [experts_by_layer(text, LAYERS) for text in split_evenly(8, 3)]
    for layer, num_experts in LAYERS.items():
        held = [expert for group in groups for expert in group.get(layer, ())]
        assert held == list(range(num_experts))
