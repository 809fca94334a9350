"""Targets behind which a servicer stands, as its server would call it; no sockets."""

import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import grpc
import torch
from tests.checkpoints import VOCAB_SIZE, tiny_checkpoint, tiny_model
from tests.fakes import holds, replica_state
from tests.fuzz.targets import Loop, Target, ends_well, expected
from transformers import AutoTokenizer

from expertmesh.experts.admission import Holding
from expertmesh.experts.batch import PackedRows
from expertmesh.experts.batcher import MicroBatcher
from expertmesh.experts.limits import BatchLimits
from expertmesh.experts.servicer import ExpertServicer
from expertmesh.router import streams
from expertmesh.router.control import ControlServicer
from expertmesh.router.core import RouterCore
from expertmesh.router.served_model import ServedModel
from expertmesh.router.servicer import RouterServicer
from expertmesh.runtime import wire
from expertmesh.runtime.channels import DEFAULT_MAX_MESSAGE_BYTES
from expertmesh.runtime.checkpoint import Checkpoint
from expertmesh.runtime.errors import ExpertMeshError, MalformedMessage
from expertmesh.runtime.hf_config import load_config
from expertmesh.runtime.missing_experts import DegradedMass
from expertmesh.runtime.security.guard import PublicGuard
from expertmesh.runtime.security.oidc import OidcTokens
from expertmesh.runtime.security.settings import CallLimits, OidcSettings
from expertmesh.runtime.security.tokens import FileTokens
from expertmesh.runtime.state import parse_record
from expertmesh.runtime.state.scaling import ScalingBoard
from expertmesh.runtime.telemetry import configure
from expertmesh.services.gateway.sampling import GenerationRequest, limits_of
from expertmesh.services.gateway.servicer import GenerateServicer
from expertmesh.services.gateway.servicer import ServedModel as GeneratedModel
from expertmesh.services.router import selector_for
from expertmesh.services.settings import SelectionSettings
from expertmesh.v1 import control_pb2, expert_pb2, generate_pb2, router_pb2

HIDDEN_SIZE = 64
TIMEOUT_S = 5.0
DEMO = Path(__file__).parents[2] / "examples/demo-moe"


class Context:
    """What servicers ask of a call."""

    def __init__(self, requests: tuple[bytes, ...] = (), metadata: Any = ()) -> None:
        self._requests = list(requests)
        self._metadata = metadata
        self.sent: list[bytes] = []

    def time_remaining(self) -> float | None:
        return TIMEOUT_S

    def invocation_metadata(self) -> Any:
        return self._metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def read(self) -> Any:
        return self._requests.pop(0) if self._requests else grpc.aio.EOF

    async def write(self, data: bytes) -> None:
        self.sent.append(data)


def expert_target(loop: Loop) -> Target:
    """One request to a replica: by the unary call, by the stream, and at once."""
    layers = {0: frozenset(range(4)), 1: frozenset({1, 5})}
    holding = Holding("tiny", layers, torch.float32, HIDDEN_SIZE, reject_nonfinite=True)

    def compute(rows: PackedRows) -> torch.Tensor:
        assert sum(rows.rows_per_expert) == len(rows.rows_RD)
        return rows.rows_RD * 2

    def state() -> control_pb2.ReplicaState:
        return replica_state()

    async def start() -> ExpertServicer:
        # on the loop: handing a row to a thread and back would be all there is to measure
        batcher = MicroBatcher(compute, BatchLimits(max_queue_rows=4096), loop.loop.time)
        await batcher.__aenter__()
        load = control_pb2.ReplicaLoad
        return ExpertServicer(batcher, holding, state, load, configure("fuzz"), "g0")

    servicer = loop.run(start())

    async def ask(data: bytes) -> None:
        way, rest = (data[0] if data else 0) % 3, data[1:]
        if way == 0:
            header, payload = wire.decode(expert_pb2.ComputeRequest, rest)
            reply = servicer.answer_at_once(header, payload)
            check_answer(reply[0] if reply else None)
        elif way == 1:
            answer = await servicer.compute(rest, Context())
            check_answer(wire.decode(expert_pb2.ComputeResponse, answer)[0])
        else:
            context = Context((rest, rest))
            try:
                await servicer.compute_stream(None, context)
            except MalformedMessage:
                assert not context.sent
            for sent in context.sent:
                check_answer(wire.decode(expert_pb2.ComputeResponse, sent)[0])

    return lambda data: ends_well(lambda: loop.run(ask(data)))


def check_answer(response: expert_pb2.ComputeResponse | None) -> None:
    """No answer may say that there is a bug."""
    if response is not None:
        assert response.error.code != grpc.StatusCode.INTERNAL.value[0], response.error


class RouterTargets:
    """A router over a tiny model whose replicas cannot be reached."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        with tempfile.TemporaryDirectory() as folder:
            path = tiny_checkpoint("mixtral", Path(folder))
            config = load_config(path)
            self._model = ServedModel("tiny", Checkpoint.open(path), config, torch.float32)
            for layer in self._model.num_experts:
                self._model.gate(layer)  # read while the file is there
        self._core, self._servicer, self._control = loop.run(self._start())

    async def _start(self) -> tuple[RouterCore, RouterServicer, ControlServicer]:
        telemetry, model = configure("fuzz"), self._model
        core = RouterCore(
            "tiny", model.num_experts, telemetry, max_message_bytes=DEFAULT_MAX_MESSAGE_BYTES
        )
        selector = selector_for(SelectionSettings(), model, core, telemetry)
        servicer = RouterServicer(
            model, core, telemetry, selector, call_timeout_s=TIMEOUT_S, reject_nonfinite=True
        )
        # holds all experts, and takes no work: planning is reached, sending is not
        everything = holds(dict.fromkeys(model.num_experts, range(8)))
        status = control_pb2.REPLICA_STATUS_DRAINING
        core.on_state(replica_state(model="tiny", holds=everything, status=status))
        board = ScalingBoard("redis://127.0.0.1:1", "m")  # nobody listens there
        return core, servicer, ControlServicer("m", core, board, lambda: (True, 0.0))

    def calls(self, data: bytes) -> None:
        """A request to RouterService."""
        kinds = (
            (router_pb2.DispatchRequest, self._servicer.Dispatch),
            (router_pb2.ForwardRequest, self._servicer.Forward),
            (router_pb2.ExplainRequest, self._servicer.Explain),
        )
        message_type, method = kinds[(data[0] if data else 0) % 3]

        async def call() -> None:
            request: Any = wire.decode_whole(message_type, data[1:])
            answer: Any = await method(request, Context())
            answer.SerializeToString()

        ends_well(lambda: self._loop.run(call()))

    def heartbeats(self, data: bytes) -> None:
        """A heartbeat that the router hears, and what ControlService makes of it."""

        async def hear() -> None:
            state = control_pb2.ReplicaState.FromString(data)
            state.address, state.replica = "127.0.0.1:1", state.replica or "r9"
            self._core.on_state(state)
            view = await self._control.GetSnapshot(control_pb2.GetSnapshotRequest(), Context())
            view.SerializeToString()
            self._core.on_gone(state.replica)

        if ends_well(lambda: parse_record(data)) is not None:
            ends_well(lambda: self._loop.run(hear()))


def answers_target(loop: Loop) -> Target:
    """What a replica answers to a router that waits for one row."""

    async def answer(data: bytes) -> None:
        got: list[Any] = []
        link = SimpleNamespace(send=lambda number, *parts: None, check_room=lambda num_bytes: None)
        with patch.object(streams, "open_link", lambda *args: link):
            stream = streams.ReplicaStream("127.0.0.1:1", 1 << 20)
        stream.send(expert_pb2.ComputeRequest(), [], 1, TIMEOUT_S, got.append)
        try:
            stream._deliver(data)
        except MalformedMessage:
            assert not got
        assert len(got) <= 1

    return lambda data: loop.run(answer(data))


class Parrot:
    """An engine that says the prompt again."""

    max_positions = 64

    async def start(self) -> None:
        """Nothing to do."""

    def is_alive(self) -> bool:
        return True

    async def submit(
        self, request: GenerationRequest, degraded: DegradedMass | None = None
    ) -> AsyncGenerator[list[int], None]:
        for count in range(request.max_new_tokens):
            yield [request.prompt[count % len(request.prompt)]]

    async def close(self, drain_s: float = 0.0) -> None:
        """Nothing to do."""


def gateway_target(loop: Loop) -> Target:
    """A request to GenerateService: the demo's tokenizer, a tiny model that scores."""
    model = tiny_model("mixtral")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    info = router_pb2.ModelInfo(name="tiny")
    limits = limits_of(model, Parrot.max_positions)
    assert limits.vocab_size == VOCAB_SIZE
    served = GeneratedModel(info, Parrot(), model, limits, tokenizer)
    servicer = GenerateServicer(served, configure("fuzz"), max_response_bytes=1 << 20)

    async def call(data: bytes) -> None:
        rest = data[1:]
        if data and data[0] % 2:
            score = wire.decode_whole(generate_pb2.ScoreRequest, rest)
            await servicer.Score(score, Context())  # type: ignore[arg-type]
            return
        request = wire.decode_whole(generate_pb2.GenerateRequest, rest)
        chunks: AsyncIterator[Any] = servicer.Generate(request, Context())  # type: ignore
        async with aclosing(chunks):  # type: ignore[type-var]
            async for chunk in chunks:
                chunk.SerializeToString()

    return lambda data: ends_well(lambda: loop.run(call(data)))


def guard_target(loop: Loop) -> Target:
    """What stands in a call's authorization."""
    folder = tempfile.mkdtemp()
    file = Path(folder) / "tokens.yaml"
    file.write_text("tokens: []", "utf-8")
    oidc = OidcSettings(issuer="https://login.example.com", audience="x")

    def no_keys(url: str) -> Any:
        raise OSError

    guard = PublicGuard(
        {"s": "route"}, [FileTokens(str(file)), OidcTokens(oidc, no_keys)], CallLimits(), "m"
    )

    async def call(data: bytes) -> None:
        metadata = (("authorization", data.decode("utf-8", "surrogateescape")),)
        try:
            await guard.caller_of("s", Context(metadata=metadata))
        except ExpertMeshError as error:
            expected(error)
        else:
            raise AssertionError("let in")

    return lambda data: loop.run(call(data))


def servicer_targets(loop: Loop) -> dict[str, Target]:
    """All of them."""
    torch.set_num_threads(1)
    router = RouterTargets(loop)
    return {
        "expert service": expert_target(loop),
        "router service": router.calls,
        "heartbeats": router.heartbeats,
        "answers": answers_target(loop),
        "generate service": gateway_target(loop),
        "authorization": guard_target(loop),
    }
