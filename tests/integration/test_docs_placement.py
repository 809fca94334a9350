"""The commands of docs/placement.md, as they stand there, against a real mesh."""

import asyncio
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from tests.mesh import Mesh, Router

from expertmesh.services import cli
from expertmesh.services.health import wait_serving
from expertmesh.services.local import free_port

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/placement.md").read_text("utf-8")
TARGET = "127.0.0.1:50051"


REDIS = "redis://127.0.0.1:6379/0"
CONTROLLER = "127.0.0.1:50053"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


async def route_something(router: Router) -> None:
    """A few tokens through every layer."""
    experts_TK = torch.tensor([[token, 7 - token] for token in (0, 0, 1, 2)])
    for layer in router.model.num_experts:
        hidden_TD, weights_TK = torch.randn(4, 128).bfloat16(), torch.full((4, 2), 0.5)
        await router.core.dispatch(layer, hidden_TD, experts_TK, weights_TK, "slot_sum")


async def test_the_page_runs(
    mesh: Mesh,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = ROOT / "examples/demo-moe"
    await mesh.replicas(path, 2)
    router = await mesh.router(path)
    await route_something(router)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "prices.yaml").write_text(blocks("yaml")[0])
    monkeypatch.chdir(tmp_path)
    printed = []
    for line in blocks("sh")[0].replace(TARGET, router.target).splitlines():
        command, _, file = line.partition(" > ")
        assert await asyncio.to_thread(cli.main, shlex.split(command)[1:]) == 0
        printed.append(capsys.readouterr().out)
        if file:
            (tmp_path / file).write_text(printed[-1])
    assert len(printed) == 4
    assert printed[1].startswith("layer,expert,rows\n0,0,2\n0,1,1\n")
    assert "note:" not in printed[2]
    assert "per million tokens" in printed[2]


async def test_the_controller_of_the_page_runs(
    mesh: Mesh, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    await mesh.replicas(ROOT / "examples/demo-moe", 2)
    start, show = blocks("sh")[1].splitlines()
    own = f"127.0.0.1:{free_port('127.0.0.1')}"
    command = shlex.split(start.replace(REDIS, mesh.redis_url))
    settings = {"mesh": mesh.name, "controller.port": own.partition(":")[2]}
    settings["controller.window_s"] = "0.2"
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "expertmesh.services.cli", *command[1:], *options
    )
    try:
        await wait_serving(own, 60)
        text = ""
        async with asyncio.timeout(60):
            while "window 0" in text or "window" not in text:
                arguments = shlex.split(show.replace(CONTROLLER, own))[1:]
                assert await asyncio.to_thread(cli.main, arguments) == 0
                text = capsys.readouterr().out
        assert "only tells" in text
        assert "no rows yet" in text
        assert await asyncio.to_thread(cli.main, [*arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["reason"] == "no rows yet"
    finally:
        process.terminate()
        assert await process.wait() == 0
