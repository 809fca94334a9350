"""How a generation goes on when a call of it fails."""

import pytest

from expertmesh.client.course import RESUMES, Course
from expertmesh.client.generate import request_of
from expertmesh.runtime.errors import (
    ExpertMeshError,
    ExpertUnavailable,
    QueueFull,
    Unavailable,
)
from expertmesh.v1 import generate_pb2

LOST = Unavailable("Socket closed")


def course(retries: int = 0, **wanted: float) -> Course:
    return Course(request_of([7, 8], max_new_tokens=9, **wanted), retries, None)  # type: ignore[arg-type]


def step(
    *tokens: int, position: int = 0, largest: float = 0.0, **fields: int
) -> generate_pb2.GenerateResponse:
    mass = generate_pb2.DegradedMass(largest=largest)
    return generate_pb2.GenerateResponse(
        tokens=tokens,
        position=position,
        degraded_mass=mass,
        **fields,  # type: ignore[arg-type]
    )


def test_the_next_call_takes_up_what_has_come() -> None:
    own = course()
    own.take(step(1, 2))
    own.take(step(3, position=2))
    own.pause_s(LOST)
    assert list(own.request.generated.ids) == [1, 2, 3]
    assert list(own.request.tokens.ids) == [7, 8]
    assert own.take(step(4, position=3)).tokens == (4,)
    assert not own.is_over


def test_the_callers_request_stays_as_it_was() -> None:
    request = request_of([7])
    Course(request, 0, None).take(step(1))
    assert not request.HasField("generated")


def test_what_has_not_begun_is_tried_as_often_as_asked_for() -> None:
    own = course(retries=1)
    own.pause_s(LOST)
    with pytest.raises(Unavailable):
        own.pause_s(LOST)


def test_without_a_new_token_an_answer_is_given_up() -> None:
    own = course()
    own.take(step(1))
    for _ in range(RESUMES):
        own.pause_s(LOST)
    with pytest.raises(Unavailable):
        own.pause_s(LOST)


def test_every_new_token_is_worth_new_tries() -> None:
    own = course()
    for position in range(3 * RESUMES):
        own.take(step(1, position=position))
        own.pause_s(LOST)


@pytest.mark.parametrize("error", [ExpertUnavailable("none"), QueueFull("full")])
def test_a_gateway_that_says_why_it_stops_is_believed(error: ExpertMeshError) -> None:
    own = course(retries=3)
    own.take(step(1))
    with pytest.raises(type(error)):
        own.pause_s(error)


def test_draws_from_a_seed_are_not_taken_up() -> None:
    own = course(seed=3)
    own.take(step(1))
    with pytest.raises(Unavailable):
        own.pause_s(LOST)


def test_a_gateway_that_starts_anew_is_noticed() -> None:
    own = course()
    own.take(step(1, 2))
    own.pause_s(LOST)
    with pytest.raises(Unavailable, match="Socket closed"):
        own.take(step(1))


def test_a_connection_lost_after_the_last_chunk_matters_to_nobody() -> None:
    own = course()
    last = own.take(step(1, finish_reason=generate_pb2.FINISH_REASON_EOS))
    assert last.finish_reason == "eos"
    assert own.is_over
    assert own.pause_s(LOST) == 0


def test_what_missing_experts_have_cost_is_remembered() -> None:
    own = course()
    own.take(step(1, largest=0.5))
    own.pause_s(LOST)
    assert own.take(step(2, position=1, largest=0.25)).degraded_mass == 0.5
