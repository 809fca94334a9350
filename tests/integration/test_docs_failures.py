"""The commands and the program of docs/failures.md, as they stand there, with a group killed."""

import asyncio
import json
import re
import shlex
from pathlib import Path

import pytest
from tests.gateways import running_gateway
from tests.mesh import Mesh

from expertmesh.services import cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/failures.md").read_text("utf-8")


def block(language: str) -> str:
    [body] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(body)


async def test_the_page_runs(mesh: Mesh, capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "examples/demo-moe"
    replicas = await mesh.replicas(path, 4)
    router = await mesh.router(path)
    async with running_gateway(mesh, path, engine="exact") as gateway:
        await mesh.kill(replicas["g1#1"])
        program = block("python").replace("127.0.0.1:50051", router.target)
        await asyncio.to_thread(exec, program, {})
        each, total = capsys.readouterr().out.splitlines()
        masses = json.loads(each)
        assert len(masses) == 8
        largest, mean = map(float, total.split())
        assert largest == pytest.approx(max(masses))
        assert mean == pytest.approx(sum(masses) / 8)
        generate, status = block("sh").splitlines()
        assert (
            await asyncio.to_thread(cli.main, shlex.split(f"{generate} --target {gateway}")[1:])
            == 0
        )
        assert "degraded: experts were missing" in capsys.readouterr().err
        assert (
            await asyncio.to_thread(cli.main, shlex.split(f"{status} --target {gateway}")[1:]) == 0
        )
        assert "MISSING, no live replica: experts 2-3 of layers 0-3" in capsys.readouterr().out
