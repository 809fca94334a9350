"""Nothing is lost between a fast model and a slow consumer."""

import asyncio

import pytest

from expertmesh.runtime.errors import Draining, ExpertUnavailable, InternalError, QueueFull
from expertmesh.services.gateway.token_stream import Admission, TokenStream, typed_error


async def test_a_slow_consumer_gets_everything_in_fewer_steps() -> None:
    stream = TokenStream()
    steps = stream.batches()
    stream.push([1])
    assert await anext(steps) == [1]
    stream.push([2])
    stream.push([3, 4])
    stream.finish()
    assert [step async for step in steps] == [[2, 3, 4]]
    assert stream.num_tokens == 4


async def test_tokens_before_a_failure_are_read_first() -> None:
    stream = TokenStream()
    steps = stream.batches()
    stream.push([1])
    stream.finish(ExpertUnavailable("gone"))
    assert await anext(steps) == [1]
    with pytest.raises(ExpertUnavailable):
        await anext(steps)


async def test_admission_refuses_too_many_and_waits_for_the_last() -> None:
    admission = Admission(1)
    with admission.admit():
        with pytest.raises(QueueFull), admission.admit():
            pass
        drained = asyncio.create_task(admission.drain(30))
        await asyncio.sleep(0)
        assert not drained.done()
    await drained
    with pytest.raises(Draining), admission.admit():
        pass


async def test_draining_gives_up_after_its_time(caplog: pytest.LogCaptureFixture) -> None:
    admission = Admission(1)
    with admission.admit():
        await admission.drain(0.01)
    assert "1 requests still run" in caplog.text


def test_typed_errors_are_the_requests_own() -> None:
    error = ExpertUnavailable("gone", layer=1)
    own = typed_error(error, closing=False)
    assert (type(own), own.message, own.fields) == (ExpertUnavailable, "gone", {"layer": "1"})
    assert own is not error
    assert type(typed_error(ValueError("bug"), closing=False)) is InternalError
    assert type(typed_error(RuntimeError("stopped"), closing=True)) is Draining
