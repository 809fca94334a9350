"""A call under way, with replicas that fail, stall and lie at random: right rows or a typed error,
each slot filed from one answer, nothing left in flight."""

import asyncio
from collections.abc import Sequence
from random import Random
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes import holds, replica_state

from expertmesh.router import shipping
from expertmesh.router.core import RouterCore
from expertmesh.router.degrade import Asked
from expertmesh.router.failover import FailoverSettings
from expertmesh.router.lenient import LenientCalls
from expertmesh.router.streams import Answer, OnAnswer, ReplicaStream
from expertmesh.runtime.errors import (
    CannotMakeIt,
    DeadlineExceeded,
    Draining,
    ExpertMeshError,
    ExpertUnavailable,
    InternalError,
    QueueFull,
    StreamClosed,
    WeightsUnavailable,
)
from expertmesh.runtime.missing_experts import Policy
from expertmesh.runtime.origin import ANYONE, Origin, Priority
from expertmesh.runtime.telemetry import configure
from expertmesh.v1 import control_pb2, expert_pb2, priority_pb2, tensor_pb2

NUM_EXPERTS = 4
HIDDEN_SIZE = 3
QUICK = FailoverSettings(silent_s=0.03, hedge_burst=4)
FAILURES: dict[str, type[ExpertMeshError]] = {
    "full": QueueFull,
    "drains": Draining,
    "no weights": WeightsUnavailable,
    "bug": InternalError,
}
MOODS = ["good", "slow", "silent", "short", "breaks", *FAILURES]


class _NoLink:
    def check_room(self, num_bytes: int) -> None:
        """There is always room."""

    def send(self, number: int, *parts: Any) -> None:
        """Goes nowhere."""

    async def close(self) -> None:
        """Nothing to close."""


class Moody(ReplicaStream):
    """A stream to a replica that triples its rows, in its mood."""

    moods: dict[str, str]
    all: list["Moody"]

    def __init__(self, address: str, *args: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("expertmesh.router.streams.open_link", lambda *args: _NoLink())
            super().__init__(address, *args)
        self.all.append(self)

    def send(
        self,
        request: expert_pb2.ComputeRequest,
        rows: Sequence[memoryview],
        num_rows: int,
        timeout_s: float,
        on_answer: OnAnswer,
    ) -> int:
        """As the replica's mood is."""
        number = super().send(request, rows, num_rows, timeout_s, on_answer)
        mood, loop = self.moods[self.address], asyncio.get_running_loop()
        if mood == "breaks":
            self._end(OSError("reset"))
        elif mood != "silent":
            payload = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.float32) * 3
            if mood == "short":
                payload = payload[1:]
            answer = self._made(request, payload.numpy().tobytes(), mood)
            loop.call_later(0.02 if mood == "slow" else 0, self._answer, number, answer)
        return number

    def _made(
        self, request: expert_pb2.ComputeRequest, payload: bytes, mood: str
    ) -> Answer | ExpertMeshError:
        if mood in FAILURES:
            return FAILURES[mood](mood)
        response = expert_pb2.ComputeResponse(
            id=request.id, dtype=request.dtype, hidden_size=request.hidden_size
        )
        return response, memoryview(payload)


def core_of(moods: dict[str, str], patch: pytest.MonkeyPatch) -> RouterCore:
    """A core whose replicas, `copies` of two groups, have these moods."""
    Moody.moods, Moody.all = moods, []
    patch.setattr(shipping, "ReplicaStream", Moody)
    core = RouterCore(
        "demo",
        {0: NUM_EXPERTS},
        configure("router", None),
        max_message_bytes=1 << 20,
        failover=QUICK,
        random=Random(1),
    )
    for address in moods:
        low = address.startswith("a")
        core.on_state(
            replica_state(
                address,
                address=address,
                holds=holds({0: [0, 1] if low else [2, 3]}),
                dtype=tensor_pb2.DTYPE_FLOAT32,
                hidden_size=HIDDEN_SIZE,
            )
        )
    return core


async def outcome(core: RouterCore, seed: int, timeout_s: float) -> torch.Tensor | ExpertMeshError:
    """Of one call; the rows are checked against what the replicas compute."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = int(torch.randint(1, 40, (), generator=generator))
    hidden_TD = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator)
    experts_TK = torch.stack([torch.randperm(NUM_EXPERTS)[:2] for _ in range(num_tokens)])
    weights_TK = torch.full((num_tokens, 2), 0.5)
    try:
        out_TD = await core.dispatch(0, hidden_TD, experts_TK, weights_TK, "slot_sum", timeout_s)
    except ExpertMeshError as error:
        return error
    assert torch.equal(out_TD, hidden_TD * 3)
    return out_TD


def nothing_is_wanted(core: RouterCore) -> bool:
    """Nobody waits for an answer any more, and no rows are said to be under way."""
    streams = core._shipper._streams.values()
    assert not core._shipper.backlog._rows
    return not any(own.is_wanted for stream in streams for own in stream._asked.values())


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(MOODS), min_size=4, max_size=4), st.integers(0, 1000))
def test_with_one_good_copy_of_everything_every_call_is_answered(
    moods: list[str], seed: int
) -> None:
    names = dict(zip(["a:1", "a:2", "b:1", "b:2"], moods, strict=True)) | {
        "a:3": "good",
        "b:3": "good",
    }

    async def calls() -> None:
        with pytest.MonkeyPatch.context() as patch:
            core = core_of(names, patch)
            answers = await asyncio.gather(*(outcome(core, seed + n, 10.0) for n in range(4)))
            assert not [answer for answer in answers if isinstance(answer, ExpertMeshError)]
            assert nothing_is_wanted(core)
            await core.close()

    asyncio.run(calls())


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(MOODS), min_size=4, max_size=4), st.integers(0, 1000))
def test_otherwise_it_is_a_typed_error_and_never_a_wrong_row(moods: list[str], seed: int) -> None:
    names = dict(zip(["a:1", "a:2", "b:1", "b:2"], moods, strict=True))
    typed = (ExpertUnavailable, QueueFull, WeightsUnavailable, InternalError, DeadlineExceeded)

    async def calls() -> None:
        with pytest.MonkeyPatch.context() as patch:
            core = core_of(names, patch)
            answers = await asyncio.gather(*(outcome(core, seed + n, 0.2) for n in range(3)))
            for answer in answers:
                assert isinstance(answer, (torch.Tensor, *typed))
            assert nothing_is_wanted(core)
            await core.close()

    asyncio.run(calls())


async def test_an_answer_that_comes_too_late_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = core_of({"a:1": "silent", "b:1": "good"}, monkeypatch)
    answer = await outcome(core, 3, 0.05)
    assert isinstance(answer, DeadlineExceeded)
    [silent] = [stream for stream in Moody.all if stream.address == "a:1"]
    for number, asked in list(silent._asked.items()):
        assert not asked.is_wanted
        silent._answer(number, StreamClosed("late"))
    assert silent.in_flight_rows == 0
    await core.close()


def busy(core: RouterCore, name: str, num_rows: int, row_ms: float, origin: Origin) -> None:
    """A replica at which an origin of this router has rows under way."""
    replica = core.snapshot.replicas[name]
    state = control_pb2.ReplicaState()
    state.CopyFrom(replica.state)
    state.sequence += 1
    state.load.row_cost_us = state.load.row_time_us = row_ms * 1e3
    core.on_state(state)
    core._shipper.stream(core.snapshot.replicas[name]).in_flight_rows += num_rows
    core._shipper.backlog.add(replica.life, origin, num_rows)


def addresses_asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of replicas, as they are sent requests."""
    asked: list[str] = []
    send = Moody.send

    def noting(self: Moody, *args: Any) -> int:
        asked.append(self.address)
        return send(self, *args)

    monkeypatch.setattr(Moody, "send", noting)
    return asked


@pytest.mark.parametrize(("timeout_s", "who"), [(60.0, "a:1"), (5.0, "a:2")])
async def test_who_could_not_make_it_is_passed_over(
    timeout_s: float, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = core_of({"a:1": "good", "a:2": "good", "b:1": "good"}, monkeypatch)
    asked = addresses_asked(monkeypatch)
    busy(core, "a:1", 1000, 5.0, ANYONE)
    busy(core, "a:2", 1500, 5.0, Origin("another"))  # who comes after
    [planned] = core.plan_call(0, torch.zeros(1, 1, dtype=torch.int64))
    assert planned.replica == "a:1", "it has less to do"
    assert isinstance(await outcome(core, 3, timeout_s), torch.Tensor)
    assert set(asked) == {who, "b:1"}
    await core.close()


async def test_when_nobody_can_make_it_the_shortest_delay_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = core_of({"a:1": "good", "a:2": "good", "b:1": "good"}, monkeypatch)
    asked = addresses_asked(monkeypatch)
    busy(core, "a:1", 100, 200.0, ANYONE)
    busy(core, "a:2", 100, 100.0, ANYONE)
    error = await outcome(core, 3, 1.0)
    assert type(error) is CannotMakeIt
    assert error.fields["replica"] == "a:2"
    assert error.retry_after_s is not None
    assert 1.0 < error.retry_after_s < 20.0
    assert not asked
    await core.close()


async def test_a_call_says_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_of({"a:1": "good", "b:1": "good"}, monkeypatch)
    asked: list[expert_pb2.ComputeRequest] = []
    send = Moody.send

    def noting(self: Moody, request: expert_pb2.ComputeRequest, *args: Any) -> int:
        asked.append(request)
        return send(self, request, *args)

    monkeypatch.setattr(Moody, "send", noting)
    hidden_TD, experts_TK = torch.randn(2, HIDDEN_SIZE), torch.tensor([[0, 2], [1, 3]])
    weights_TK = torch.ones(2, 2)
    origin = Origin("ann", Priority.BATCH)
    await core.dispatch(0, hidden_TD, experts_TK, weights_TK, "slot_sum", 5.0, origin=origin)
    lenient = LenientCalls(core, core._metrics)
    for policy in get_args(Policy):
        routed = Asked(experts_TK, weights_TK, policy, origin=origin)
        await lenient.dispatch(0, hidden_TD, routed, "slot_sum", 5.0)
    assert len(asked) == 8
    assert {(own.caller, own.priority) for own in asked} == {("ann", priority_pb2.PRIORITY_BATCH)}
    await core.close()
