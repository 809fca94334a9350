"""When clients try again: as told, with a little chance, and never beyond the time they have."""

import pytest
from tests.fakes import FakeClock

from expertmesh.client.retries import Patience
from expertmesh.runtime.errors import ExpertMeshError, InvalidInput, QueueFull, Unavailable


def patience(
    retries: int = 3, timeout_s: float | None = 10.0, draw: float = 0.0
) -> tuple[Patience, FakeClock]:
    clock = FakeClock()
    return Patience(retries, timeout_s, clock, lambda: draw), clock


def test_the_callee_says_when() -> None:
    own, _ = patience()
    assert own.pause_s(QueueFull("full").after(0.7)) == 0.7
    own, _ = patience(draw=1.0)
    assert own.pause_s(QueueFull("full").after(0.7)) == pytest.approx(1.05), "never earlier"


def test_without_a_word_pauses_grow() -> None:
    own, _ = patience(retries=8, timeout_s=None)
    pauses = [own.pause_s(Unavailable("gone")) for _ in range(8)]
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert own.left_s() is None


@pytest.mark.parametrize(
    ("retries", "timeout_s", "error"),
    [
        (0, None, QueueFull("not asked for")),
        (5, None, InvalidInput("would be wrong again")),
        (5, 1.0, QueueFull("no time").after(1.0)),
    ],
)
def test_the_error_is_the_answer_when_trying_again_is_of_no_use(
    retries: int, timeout_s: float | None, error: ExpertMeshError
) -> None:
    own, _ = patience(retries, timeout_s)
    with pytest.raises(type(error)) as caught:
        own.pause_s(error)
    assert caught.value is error


def test_tries_and_pauses_share_the_time() -> None:
    own, clock = patience(timeout_s=1.0)
    clock.advance(0.4)
    assert own.left_s() == pytest.approx(0.6)
    own.pause_s(QueueFull("full").after(0.5))
    clock.advance(0.5)
    with pytest.raises(QueueFull):
        own.pause_s(QueueFull("full").after(0.2))


def test_the_number_of_retries_is_the_callers() -> None:
    own, _ = patience(retries=2)
    for _ in range(2):
        own.pause_s(QueueFull("full").after(0.0))
    with pytest.raises(QueueFull):
        own.pause_s(QueueFull("full").after(0.0))
