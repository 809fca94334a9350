"""The commands and the program of docs/routing.md, as they stand there, against a real mesh."""

import asyncio
import json
import re
import shlex
from pathlib import Path

import pytest
from tests.mesh import Mesh

from expertmesh.services import cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/routing.md").read_text("utf-8")
TARGET = "127.0.0.1:50051"


def block(language: str) -> str:
    [body] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(body)


async def test_the_page_runs(mesh: Mesh, capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "examples/demo-moe"
    await mesh.replicas(path, 4)
    router = await mesh.router(path)
    program = block("python").replace(TARGET, router.target)
    await asyncio.to_thread(exec, program, {})
    given_up = json.loads(capsys.readouterr().out)
    assert len(given_up) == 4
    assert all(0 <= lost <= 0.05 for lost in given_up)
    commands = block("sh").replace(TARGET, router.target).splitlines()
    assert len(commands) == 3
    for command in commands:
        assert await asyncio.to_thread(cli.main, shlex.split(command)[1:]) == 0
        assert "the gate's" in capsys.readouterr().out
