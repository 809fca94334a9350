"""The model's thread calling the router core on the event loop, several calls at once."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.fakes import FakeClock, holds, replica_state
from tests.waiting import until

from expertmesh.router import shipping
from expertmesh.router.core import RouterCore
from expertmesh.router.latency import Latencies
from expertmesh.router.streams import OnAnswer
from expertmesh.runtime.errors import ExpertUnavailable, InvalidInput
from expertmesh.runtime.origin import Origin
from expertmesh.runtime.telemetry import configure
from expertmesh.services.callers import CoreCaller
from expertmesh.v1 import expert_pb2, router_pb2

SLOT_SUM = router_pb2.COMBINE_SLOT_SUM
EXPERTS_TK = torch.tensor([[0, 1], [1, 0]])
WEIGHTS_TK = torch.tensor([[0.5, 0.25], [0.5, 0.25]])


class Echo:
    """A stream to experts that answer their input; each answer waits for its gate."""

    closed = False
    in_flight_rows = 0

    def observe_transport(self, transport_us: float, now_s: float) -> None:
        """Nobody asks."""

    def __init__(self) -> None:
        self.calls = 0
        self.latencies = Latencies()
        self.gates = [asyncio.Event() for _ in range(8)]
        self.tasks: list[asyncio.Future[None]] = []

    def send(
        self,
        request: expert_pb2.ComputeRequest,
        rows: Sequence[memoryview],
        num_rows: int,
        timeout_s: float,
        on_answer: OnAnswer,
    ) -> int:
        """The rows as they came, once the call's gate is open."""
        gate = self.gates[self.calls]
        self.calls += 1
        answer = expert_pb2.ComputeResponse(dtype=request.dtype, hidden_size=request.hidden_size)
        payload = b"".join(rows)

        async def opened() -> None:
            await gate.wait()
            on_answer((answer, memoryview(payload)))

        self.tasks.append(asyncio.ensure_future(opened()))
        return self.calls

    def cancel(self, number: int) -> None:
        """Nobody wants it any more."""

    async def close(self) -> None:
        """Its replica has gone."""


@pytest.fixture
async def echo(monkeypatch: pytest.MonkeyPatch) -> Echo:
    """The stream that every router core of this test opens."""
    echo = Echo()
    monkeypatch.setattr(shipping, "ReplicaStream", lambda *args: echo)
    return echo


@pytest.fixture
async def core(echo: Echo) -> RouterCore:
    """A real core with one replica that holds both experts."""
    telemetry = configure("router", None)
    core = RouterCore("demo", {0: 2}, telemetry, max_message_bytes=1 << 20, clock=FakeClock())
    core.on_state(replica_state(holds=holds({0: [0, 1]})))
    return core


@pytest.fixture
async def caller(core: RouterCore) -> CoreCaller:
    """A caller of that core."""
    caller = CoreCaller(asyncio.get_running_loop())
    caller.core = core
    return caller


def dispatch(caller: CoreCaller, hidden_TD: torch.Tensor, **changes: Any) -> torch.Tensor:
    """One call, from a forward in inference mode as transformers runs it."""
    args: dict[str, Any] = {
        "layer": 0,
        "experts_TK": EXPERTS_TK,
        "weights_TK": WEIGHTS_TK,
        "combine": SLOT_SUM,
    }
    with torch.inference_mode():
        return caller.dispatch(hidden_TD=hidden_TD * 1, **(args | changes))


async def test_a_forward_waits_for_its_experts(
    echo: Echo, core: RouterCore, caller: CoreCaller
) -> None:
    hidden_TD = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    call = asyncio.create_task(asyncio.to_thread(dispatch, caller, hidden_TD))
    await until(lambda: echo.calls == 1)
    assert not call.done()
    echo.gates[0].set()
    assert torch.equal(await call, hidden_TD * 0.75)
    assert core.usage.to_proto().layers[0].rows == [2, 2]


async def test_calls_overlap(echo: Echo, caller: CoreCaller) -> None:
    hidden = [torch.full((2, 3), float(value)) for value in (1, 2, 3)]
    calls = []
    for index, hidden_TD in enumerate(hidden):
        calls.append(asyncio.create_task(asyncio.to_thread(dispatch, caller, hidden_TD)))
        await until(lambda index=index: echo.calls == index + 1)  # type: ignore[misc]
    for index in (1, 0, 2):
        echo.gates[index].set()
        assert torch.equal(await calls[index], hidden[index] * 0.75)
        assert not torch.is_inference_mode_enabled(), "the loop is not left in a mode of a call"


async def test_errors_keep_their_type(core: RouterCore, caller: CoreCaller) -> None:
    core.on_gone("r0")
    with pytest.raises(ExpertUnavailable, match="layer 0, expert 0"):
        await asyncio.to_thread(dispatch, caller, torch.zeros(2, 3))
    with pytest.raises(InvalidInput, match=r"experts.shape"):
        await asyncio.to_thread(dispatch, caller, torch.zeros(5, 3))


async def test_the_callers_of_the_forward_are_asked_at_each_call(
    core: RouterCore, caller: CoreCaller, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    async def dispatched(*args: Any) -> torch.Tensor:
        asked.append(args[4:])
        return torch.zeros(1)

    monkeypatch.setattr(core, "dispatch", dispatched)
    for traceparents in ((), ("a", "b")):
        caller.callers = lambda traceparents=traceparents: traceparents  # type: ignore[misc]
        caller.origin = lambda traceparents=traceparents: Origin(f"{len(traceparents)}")  # type: ignore[misc]
        await asyncio.to_thread(dispatch, caller, torch.zeros(2, 3))
    modes = [(mode, callers, origin.caller) for mode, _, callers, origin in asked]
    assert modes == [("slot_sum", (), "0"), ("slot_sum", ("a", "b"), "2")]
