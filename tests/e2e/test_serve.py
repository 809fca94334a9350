"""`expertmesh serve` of the demo model, used in every way README tells, then stopped."""

import asyncio
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from tests.e2e.readme import ROOT, blocks, commands
from tests.e2e.served import Served, environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertmesh.client import AsyncClient, Client, request_of
from expertmesh.runtime.errors import (
    DeadlineExceeded,
    ExpertMeshError,
    InvalidInput,
    UnknownModel,
)
from expertmesh.services.parity import generate_greedy, pad_left
from expertmesh.services.status import MeshView
from expertmesh.v1 import control_pb2, generate_pb2

MODEL = Path("examples/demo-moe")
START_S = 180.0
NUM_NEW = 16
CLI = [sys.executable, "-m", "expertmesh.services.cli"]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def snapshot(served: Served) -> control_pb2.GetSnapshotResponse:
    with MeshView(served.router) as view:
        return view.read()


def test_text_streams_as_transformers_would_write_it(
    served: Served, reference: Any, tokenizer: Any
) -> None:
    prompt = "And it came to pass,"
    with Client(served.gateway) as client:
        chunks = list(client.generate(prompt, max_new_tokens=NUM_NEW))
    alone = generate_greedy(reference, pad_left([tokenizer.encode(prompt)], pad_id=0))
    expected = alone.tokens_BN[0].tolist()
    assert [token for chunk in chunks for token in chunk.tokens] == expected
    assert "".join(chunk.text for chunk in chunks) == tokenizer.decode(expected)
    assert len(chunks) > 1, "it did not stream"
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].generated_tokens == NUM_NEW


def test_eight_prompts_at_once_get_the_tokens_each_gets_alone(
    served: Served, reference: Any, tokenizer: Any
) -> None:
    prompts = [f"{start} {end}" for start in ("def", "the") for end in ("a", "b", "one", "two")]
    with Client(served.gateway) as client, ThreadPoolExecutor(len(prompts)) as threads:

        def tokens(prompt: str) -> list[int]:
            chunks = client.generate(prompt, max_new_tokens=NUM_NEW, ignore_eos=True)
            return [token for chunk in chunks for token in chunk.tokens]

        got = list(threads.map(tokens, prompts))
    for prompt, own in zip(prompts, got, strict=True):
        alone = generate_greedy(reference, pad_left([tokenizer.encode(prompt)], pad_id=0))
        assert own == alone.tokens_BN[0].tolist(), prompt


def test_generation_ends_before_a_stop_string(served: Served) -> None:
    with Client(served.gateway) as client:
        free = "".join(c.text for c in client.generate("import os", max_new_tokens=32))
        stop = free[10:14]
        chunks = list(client.generate("import os", max_new_tokens=32, stop=[stop]))
    assert "".join(chunk.text for chunk in chunks) == free[: free.index(stop)]
    assert chunks[-1].finish_reason == "stop"


async def test_cancelling_frees_the_slot(served: Served) -> None:
    """Far more cancelled calls than there are places; the next call still gets one."""
    async with AsyncClient(served.gateway) as client:
        for _ in range(40):
            stream = client.generate(request_of("namespace", max_new_tokens=400, ignore_eos=True))
            async for _chunk in stream:
                break
            await stream.aclose()
        async with asyncio.timeout(30):
            request = request_of("namespace", max_new_tokens=4, ignore_eos=True)
            chunks = [chunk async for chunk in client.generate(request)]
    assert chunks[-1].generated_tokens == 4


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "no-such-model"}, UnknownModel),
        ({"prompt": []}, InvalidInput),
        ({"prompt": [10**6]}, InvalidInput),
        ({"temperature": -1.0}, InvalidInput),
        ({"top_p": 2.0}, InvalidInput),
        ({"max_new_tokens": 10**6}, InvalidInput),
        ({"max_new_tokens": 400, "timeout_s": 0.05, "ignore_eos": True}, DeadlineExceeded),
    ],
)
def test_a_wrong_call_is_refused_and_the_next_is_served(
    served: Served, changes: dict[str, Any], error: type[ExpertMeshError]
) -> None:
    prompt = changes.pop("prompt", "def main(")
    with Client(served.gateway) as client:
        with pytest.raises(error):
            list(client.generate(prompt, **changes))
        assert list(client.generate("def main(", max_new_tokens=2))[-1].generated_tokens == 2


def test_the_router_knows_every_replica(served: Served) -> None:
    seen = snapshot(served)
    groups = {view.state.group: view.state for view in seen.replicas}
    assert sorted(groups) == ["g0", "g1", "g2", "g3"]
    assert seen.redis_connected
    for state in groups.values():
        assert state.device.total_bytes > state.device.free_bytes > 0
        assert state.weight_bytes > 0
        assert {layer.layer for layer in state.holds} == {0, 1, 2, 3}
    held = sorted(e for state in groups.values() for e in state.holds[0].experts)
    assert held == list(range(8))


def test_a_killed_replica_is_out_of_sight_and_replaced(served: Served) -> None:
    """Serve starts another; meanwhile callers get a typed error at once, never a wrong number."""
    victim = next(view.state for view in snapshot(served).replicas if view.state.group == "g1")
    psutil.Process(victim.pid).kill()
    outcomes: list[str] = []
    with Client(served.gateway) as client:

        def ask() -> str:
            """ "served", or the code of the error, which must come at once."""
            started_s = time.monotonic()
            try:
                list(client.generate("def main(", max_new_tokens=2))
            except ExpertMeshError as error:
                took_s = time.monotonic() - started_s
                return error.code.name if took_s < 5 else f"{error.code.name} after {took_s} s"
            return "served"

        def replaced() -> bool:
            outcomes.append(ask())
            g1 = [v.state for v in snapshot(served).replicas if v.state.group == "g1"]
            return bool(g1) and g1[0].pid != victim.pid and outcomes[-1] == "served"

        deadline_s = time.monotonic() + START_S
        while not replaced():
            assert time.monotonic() < deadline_s, outcomes[-5:]
    assert set(outcomes) == {"UNAVAILABLE", "served"}


def test_status_and_generate_commands(served: Served) -> None:
    def run(*args: str) -> str:
        done = subprocess.run([*CLI, *args], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    table = run("status", "--once", "--target", served.router)
    assert all(group in table for group in ("g0", "g1", "g2", "g3"))
    assert run("generate", "def main(", "--max-new-tokens", "4", "--target", served.gateway).strip()


def test_reflection_and_health_on_the_gateway(served: Served) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    with grpc.insecure_channel(served.gateway) as channel:
        names = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert generate_pb2.DESCRIPTOR.services_by_name["GenerateService"].full_name in names
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_a_second_mesh_on_taken_ports_says_so(served: Served) -> None:
    port = served.router.rpartition(":")[2]
    done = subprocess.run(
        [*CLI, "router", "--set", f"model={MODEL}", "--set", f"router.port={port}",
         "--set", "redis.url=redis://127.0.0.1:1/0"],
        capture_output=True,
        text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_readmes_commands_for_a_running_mesh(served: Served) -> None:
    for line in commands():
        if line.startswith(("expertmesh status", "expertmesh generate", "expertmesh inspect")):
            done = run_shell(line)
            assert done.stdout.strip(), line


def test_readmes_programs(served: Served) -> None:
    outputs = [run_shell(f"python - <<'END'\n{body}END\n").stdout for body in blocks("python")]
    assert len(outputs) == 2
    assert all(output.strip() for output in outputs)


def run_shell(script: str) -> "subprocess.CompletedProcess[str]":
    """As in a shell with the venv activated, in the checkout."""
    done = subprocess.run(
        ["bash", "-ec", script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=environment(),
    )
    assert done.returncode == 0, f"{script}: {done.stderr[-2000:]}"
    return done
