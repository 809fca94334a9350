"""Bad requests to a replica: each has its code and reason, and the next good one succeeds."""

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import pytest
import torch
from tests.mesh import MakeCheckpoint, Mesh, stalled
from tests.packing import HIDDEN_SIZE, ExpertCaller, pack, random_hidden
from tests.waiting import until

from expertmesh.client.failures import error_of
from expertmesh.runtime.errors import (
    ConfigError,
    DeadlineExceeded,
    ExpertMeshError,
    InvalidInput,
    MalformedMessage,
    MessageTooLarge,
    NonFiniteInput,
    QueueFull,
    UnknownExpert,
    UnknownModel,
)
from expertmesh.v1 import expert_pb2, tensor_pb2

GARBAGE = b"\xff" * 40


def good(request_id: int = 1, *, num_tokens: int = 3) -> expert_pb2.ComputeRequest:
    """Rows for experts 1 and 4 of layer 0."""
    hidden_TD = random_hidden(num_tokens, request_id)
    experts_T = torch.tensor([1, 4] * num_tokens)[:num_tokens]
    return pack(hidden_TD, experts_T, id=request_id, layer=0).request


class Wrong(NamedTuple):
    """What to change in a good request, and what it must be answered with."""

    change: Callable[[Any], None]
    error: type[ExpertMeshError]
    text: str
    fields: dict[str, str] = {}  # noqa: RUF012 (never changed)


def put(**fields: Any) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        for name, value in fields.items():
            if isinstance(value, list):
                getattr(request, name)[:] = value
            else:
                setattr(request, name, value)

    return change


def put_value(value: float) -> Callable[[Any], None]:
    """Into the last element of the second row."""

    def change(request: Any) -> None:
        at = (2 * HIDDEN_SIZE - 1) * 4
        own = torch.tensor(value).numpy().tobytes()
        request.rows = request.rows[:at] + own + request.rows[at + 4 :]

    return change


WRONG = {
    "dtype": Wrong(put(dtype=tensor_pb2.DTYPE_BFLOAT16), InvalidInput, "dtype: .*float32"),
    "no dtype": Wrong(put(dtype=0), InvalidInput, "dtype: .*DType 0"),
    "future dtype": Wrong(put(dtype=99), InvalidInput, "dtype: .*DType 99"),
    "hidden size": Wrong(
        put(hidden_size=32), InvalidInput, "hidden_size: expected 64.*got 32", {"got": "32"}
    ),
    "rows cut short": Wrong(put(rows=b"\0" * 100), InvalidInput, "rows: .*768 bytes.*100 bytes"),
    "no rows": Wrong(put(rows=b""), InvalidInput, "rows: expected 768 bytes"),
    "layer": Wrong(put(layer=9), UnknownExpert, r"layer 9: .*\[0, 1\]", {"layer": "9"}),
    "expert": Wrong(
        put(experts=[1, 77]), UnknownExpert, "expert 77", {"layer": "0", "expert": "77"}
    ),
    "expert not held": Wrong(put(experts=[1, 7]), UnknownExpert, "expert 7: .*0, 1, 2, 3, 4, 5"),
    "a count too few": Wrong(put(rows_per_expert=[3]), InvalidInput, "1 counts for 2 experts"),
    "zero count": Wrong(put(rows_per_expert=[3, 0]), InvalidInput, "rows_per_expert: .*at least 1"),
    "wrong sum": Wrong(put(rows_per_expert=[2, 2]), InvalidInput, "rows: expected 1024 bytes"),
    "huge counts": Wrong(put(rows_per_expert=[2**32 - 1] * 2), InvalidInput, "rows: expected"),
    "nothing": Wrong(put(experts=[], rows_per_expert=[]), InvalidInput, "rows_per_expert"),
    "unsorted": Wrong(put(experts=[4, 1]), InvalidInput, r"experts: .*ascending.*\[4, 1\]"),
    "twice the same": Wrong(put(experts=[4, 4]), InvalidInput, "experts: .*distinct"),
    "model": Wrong(put(model="other"), UnknownModel, "model 'other': .*'tiny'"),
    "NaN": Wrong(put_value(torch.nan), NonFiniteInput, "row 1 of 3", {"row": "1"}),
    "infinity": Wrong(put_value(-torch.inf), NonFiniteInput, "row 1 of 3"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
async def test_a_bad_request_costs_only_itself(
    wrong: Wrong, mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    replica = await mesh.replica(checkpoint("mixtral"), "0-5", reject_nonfinite=True)
    bad = good(5)
    wrong.change(bad)
    async with ExpertCaller(replica.address) as caller:
        expected = (await caller.ask(good())).rows
        for error in (await caller.refused(bad), await caller.refused_unary(bad)):
            assert type(error) is wrong.error
            assert re.search(wrong.text, error.message)
            assert error.fields.items() >= wrong.fields.items()
        assert (await caller.ask(good())).rows == expected
        assert replica.load().queued_rows == 0


async def test_nan_is_computed_unless_it_is_to_be_rejected(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    request = good()
    put_value(torch.nan)(request)
    async with ExpertCaller(replica.address) as caller:
        assert len((await caller.ask(request)).rows) == 3 * HIDDEN_SIZE * 4


async def test_an_expired_deadline(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    async with ExpertCaller(replica.address) as caller:
        with stalled(replica) as stall:
            await caller.stream.write(good(1))
            await until(lambda: stall.num_batches == 1)
            late = good(2)
            late.timeout_ms = 30
            for error in (
                await caller.refused(late),
                await caller.refused_unary(late),
                await caller.refused_unary(good(3), timeout_s=0.03),
            ):
                assert type(error) is DeadlineExceeded
            await until(lambda: replica.load().queued_rows == 3)
        assert (await caller.stream.read()).rows
        assert (await caller.ask(good(4))).rows
        await until(lambda: replica.load().queued_rows == 0)


async def test_a_full_queue_refuses_at_once(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    replica.set_live({"max_queue_rows": 5})
    async with ExpertCaller(replica.address) as caller:
        with stalled(replica):
            await caller.stream.write(good(1))
            await until(lambda: replica.load().queued_rows == 3)
            for error in (await caller.refused(good(2)), await caller.refused_unary(good(2))):
                assert type(error) is QueueFull
                assert error.retryable
                assert error.fields == {"queued_rows": "3", "max_queue_rows": "5", "rows": "3"}
        assert (await caller.stream.read()).id == 1
        assert type(await caller.refused(good(3, num_tokens=6))) is QueueFull
        assert (await caller.ask(good(2))).rows


async def test_wrong_limits_change_nothing(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    replica.set_live({"max_queue_rows": 2})
    with pytest.raises(ConfigError, match="max_batch_rows"):
        replica.set_live({"max_queue_rows": 99, "max_batch_rows": 0})
    async with ExpertCaller(replica.address) as caller:
        assert type(await caller.refused(good())) is QueueFull


async def test_garbage_ends_its_own_stream_only(
    mesh: Mesh, checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    async with ExpertCaller(replica.address) as caller:
        with stalled(replica) as stall:
            await caller.stream.write(good(1))
            await until(lambda: stall.num_batches == 1)
            broken = caller.raw_stream()
            await broken.write(good(2).SerializeToString())
            await until(lambda: replica.load().queued_rows == 6)
            await broken.write(GARBAGE)
            await caller.stream.write(good(3))
            await until(lambda: replica.load().queued_rows == 9)
            stall.release()
            answer = expert_pb2.ComputeResponse.FromString(await broken.read())
            assert (answer.id, answer.HasField("error")) == (2, False)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await broken.read()
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert type(error_of(caught.value)) is MalformedMessage
        assert [(await caller.stream.read()).id for _ in range(2)] == [1, 3]
        assert (await caller.ask(good(4))).rows
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_garbage_in_a_unary_call(mesh: Mesh, checkpoint: MakeCheckpoint) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    async with grpc.aio.insecure_channel(replica.address) as channel:
        compute: Any = channel.unary_unary("/expertmesh.v1.ExpertService/Compute")
        for data in (GARBAGE, good().SerializeToString()[:-1]):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await compute(data)
            assert type(error_of(caught.value)) is MalformedMessage
        assert await compute(good().SerializeToString())


async def test_a_message_above_the_limit_ends_its_own_stream_only(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    replica = await mesh.replica(checkpoint("mixtral"), max_message_bytes=1 << 14)
    large = good(2, num_tokens=100)
    async with ExpertCaller(replica.address) as caller:
        await caller.ask(good(1))
        broken = caller.raw_stream()
        await broken.write(large.SerializeToString())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await broken.read()
        assert type(error_of(caught.value)) is MessageTooLarge
        assert type(await caller.refused_unary(large)) is MessageTooLarge
        assert (await caller.ask(good(3))).rows


async def test_a_caller_that_only_stops_writing_gets_its_answers(
    mesh: Mesh, checkpoint: MakeCheckpoint
) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    async with ExpertCaller(replica.address) as caller:
        with stalled(replica) as stall:
            for index in range(1, 4):
                await caller.stream.write(good(index))
            await caller.stream.done_writing()
            await until(lambda: replica.load().queued_rows == 9)
            stall.release()
            assert [(await caller.stream.read()).id for _ in range(3)] == [1, 2, 3]
        assert await caller.stream.read() is grpc.aio.EOF
        assert await caller.stream.code() == grpc.StatusCode.OK


@pytest.mark.parametrize("how", ["cancels", "vanishes"])
async def test_a_caller_that_goes_leaves_no_rows_behind(
    how: str, mesh: Mesh, checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    replica = await mesh.replica(checkpoint("mixtral"))
    async with ExpertCaller(replica.address) as stays:
        with stalled(replica) as stall:
            async with ExpertCaller(replica.address) as goes:
                for index in range(1, 4):
                    await goes.stream.write(good(index))
                unary = asyncio.ensure_future(goes.stub.Compute(good(4)))
                await until(lambda: replica.load().queued_rows == 12)
                if how == "cancels":
                    goes.stream.cancel()
                    unary.cancel()
                    await until(lambda: replica.load().queued_rows == 0)
            await asyncio.gather(unary, return_exceptions=True)
            await until(lambda: replica.load().queued_rows == 0)
            stall.release()
        assert (await stays.ask(good(5))).rows
        assert replica.load().queued_rows == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
