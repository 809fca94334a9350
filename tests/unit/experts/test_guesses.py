"""Guesses of the next layer's experts: by its gate or by habit, trusted where they were right."""

import torch

from expertmesh.experts.guesses import MAX_ROWS, Guesses, NextGates
from expertmesh.experts.prefetch import CoActivation
from expertmesh.experts.residency import ExpertKey

LAYERS = [0, 1, 2]
EYE_ED = torch.eye(4)
HELD = {ExpertKey(layer, expert) for layer in LAYERS for expert in range(4)}


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def guesses(gates: dict[int, torch.Tensor], held: set[ExpertKey] = HELD) -> Guesses:
    return Guesses(CoActivation(LAYERS), NextGates(LAYERS, gates, top_k=1), held)


def test_the_next_gate_ranks_each_rows_best_before_any_second() -> None:
    gates = NextGates(LAYERS, {1: EYE_ED}, top_k=2)
    rows_RD = torch.tensor([[4.0, 3, 0, 0], [0.0, 3, 0, 4], [4.0, 0, 0, 3]])
    assert gates.predict(0, rows_RD) == [ExpertKey(1, expert) for expert in (0, 3, 1)]


def test_no_guess_without_a_gate_after_the_last_layer_or_for_many_rows() -> None:
    gates = NextGates(LAYERS, {0: EYE_ED, 1: EYE_ED}, top_k=2)
    assert gates.predict(1, row(1, 0, 0, 0)) == [], "layer 2's gate is not known"
    assert gates.predict(2, row(1, 0, 0, 0)) == [], "the next token is not known"
    assert gates.predict(0, torch.ones(MAX_ROWS + 1, 4)) == []


def test_more_experts_per_token_than_there_are() -> None:
    gates = NextGates([0, 1], {1: EYE_ED}, top_k=9)
    assert len(gates.predict(0, row(1, 2, 3, 4))) == 4


def test_a_guess_is_trusted_only_after_it_was_right() -> None:
    own = guesses({1: EYE_ED})
    assert own.after(0, [0], row(0, 0, 9, 0)) == ()
    own.after(1, [2], row(0, 0, 0, 0))
    assert own.after(0, [0], row(0, 9, 0, 0)) == [ExpertKey(1, 1)]


def test_a_gate_that_is_mostly_wrong_is_not_followed() -> None:
    own = guesses({1: EYE_ED})
    for step in range(20):
        expert = 2 if step % 5 == 0 else step % 2
        likely = own.after(0, [0], row(0, 0, 9, 0))
        assert ExpertKey(1, 2) not in likely or step < 3
        own.after(1, [expert], row(0, 0, 0, 0))


def test_habits_are_followed_where_no_gate_is_known() -> None:
    own = guesses({})
    for _ in range(3):
        likely = own.after(0, [0], row(0, 0, 0, 0))
        own.after(1, [3], row(0, 0, 0, 0))
    assert likely == [ExpertKey(1, 3)]


def test_the_better_way_of_guessing_wins() -> None:
    own = guesses({1: EYE_ED})
    for step in range(12):
        expert = step % 4
        row_RD = torch.eye(4)[expert : expert + 1]
        likely = own.after(0, [0], row_RD)
        assert step == 0 or likely == [ExpertKey(1, expert)]
        own.after(1, [expert], row(0, 0, 0, 0))


def test_what_others_hold_is_not_guessed() -> None:
    own = guesses({1: EYE_ED}, held=HELD - {ExpertKey(1, 2)})
    for _ in range(3):
        assert ExpertKey(1, 2) not in own.after(0, [0], row(0, 0, 9, 0))
        own.after(1, [2], row(0, 0, 0, 0))
