"""Decisions and orders through a real Redis: from the policy's thread to people, and back."""

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from redis.asyncio import Redis
from tests.mesh import MakeCheckpoint, Mesh
from tests.waiting import until

from expertmesh.experts.scaling import Override
from expertmesh.experts.scaling_desk import ScalingDesk
from expertmesh.runtime.errors import InvalidInput, Unavailable
from expertmesh.runtime.state.scaling import ScalingBoard, decision_key, override_key
from expertmesh.services import cli
from expertmesh.v1 import control_pb2 as pb

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
T = TypeVar("T")
_numbers = itertools.count()


def decision(group: str = "g0", mode: int = pb.SCALING_MODE_ON, wanted: int = 2) -> pb.GroupScaling:
    return pb.GroupScaling(
        group=group,
        mode=mode,  # type: ignore[arg-type]
        wanted=wanted,
        present=1,
        ready=1,
        reason="load",
        text="load of 1.20 replicas, each to be 70% busy",
        demand=1.2,
        queue_time_us=3500,
        min_replicas=1,
        max_replicas=4,
    )


@pytest.fixture
async def board(redis_url: str) -> AsyncIterator[ScalingBoard]:
    async with ScalingBoard(redis_url, f"board-{next(_numbers)}") as board:
        yield board


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(redis_url)
    yield client
    await client.aclose()


def desk_of(board: ScalingBoard, redis_url: str, group: str = "g0") -> ScalingDesk:
    return ScalingDesk(redis_url, board._mesh, group)


async def told(board: ScalingBoard, num: int = 1) -> list[pb.GroupScaling]:
    """The decisions, once there are so many."""
    for _ in range(1000):
        if len(decisions := await board.read()) >= num:
            return decisions
        await asyncio.sleep(0.02)
    raise AssertionError("nothing was told")


async def test_decisions_are_read_as_they_are_told(board: ScalingBoard, redis_url: str) -> None:
    assert await board.read() == []
    first, second = desk_of(board, redis_url, "g1"), desk_of(board, redis_url, "g0")
    first.tell(decision("g1"))
    second.tell(decision("g0", wanted=3))
    decisions = await told(board, 2)
    assert [(own.group, own.wanted) for own in decisions] == [("g0", 3), ("g1", 2)]
    assert all(own.age_ms < 10_000 for own in decisions)


async def test_a_decision_that_is_not_renewed_is_forgotten(
    board: ScalingBoard, redis_url: str, redis: Redis
) -> None:
    desk = desk_of(board, redis_url)
    desk.tell(decision())
    await told(board)
    assert 0 < await redis.pttl(decision_key(board._mesh, "g0")) <= 10_000
    await redis.delete(decision_key(board._mesh, "g0"))
    await asyncio.sleep(0.6)  # two rounds of the thread
    assert await board.read() == [], "the same decision is not written twice"


async def test_an_order_reaches_the_policy_and_expires(
    board: ScalingBoard, redis_url: str, redis: Redis
) -> None:
    desk = desk_of(board, redis_url)
    desk.tell(decision())
    await told(board)
    assert desk.override is None
    await board.set_replicas("g0", 3, 600_000)
    await until(lambda: desk.override is not None)
    assert isinstance(desk.override, Override)
    assert desk.override.replicas == 3
    assert 0 < await redis.pttl(override_key(board._mesh, "g0")) <= 600_000
    assert await board.release("g0")
    await until(lambda: desk.override is None)
    assert not await board.release("g0")


async def test_garbage_in_redis_is_no_order(
    board: ScalingBoard, redis_url: str, redis: Redis
) -> None:
    await redis.set(override_key(board._mesh, "g0"), b"\xff3", px=60_000)
    await redis.set(decision_key(board._mesh, "g1"), b"\xff\xff", px=60_000)
    desk = desk_of(board, redis_url)
    desk.tell(decision())
    assert [own.group for own in await told(board)] == ["g0"]
    assert desk.override is None


@pytest.mark.parametrize(
    ("group", "replicas", "for_ms", "message"),
    [
        ("g9", 2, 60_000, r"group: expected one that is scaled \(g0, g1\), got 'g9'"),
        ("g1", 2, 60_000, "g1, which is advised only"),
        ("g0", 5, 60_000, "replicas: expected 1 to 4, the bounds of g0, got 5"),
        ("g0", 0, 60_000, "replicas: expected 1 to 4"),
        ("g0", 2, 999, "for_ms: expected 1000 to"),
    ],
)
async def test_orders_that_cannot_be_followed_are_refused(
    board: ScalingBoard, redis: Redis, group: str, replicas: int, for_ms: int, message: str
) -> None:
    advised = decision("g1", pb.SCALING_MODE_ADVISORY)
    for own in (decision("g0"), advised):
        await redis.set(decision_key(board._mesh, own.group), own.SerializeToString(), px=60_000)
    with pytest.raises(InvalidInput, match=message):
        await board.set_replicas(group, replicas, for_ms)
    assert await redis.get(override_key(board._mesh, group)) is None


async def test_without_redis_people_are_told_so() -> None:
    async with ScalingBoard("redis://127.0.0.1:1", "nobody") as board:
        with pytest.raises(Unavailable, match="redis does not answer"):
            await board.read()
        with pytest.raises(Unavailable, match="redis does not answer"):
            await board.release("g0")


async def blocking(work: Callable[[], T]) -> T:
    """The command line, beside the mesh's loop."""
    return await asyncio.wait_for(asyncio.to_thread(work), 60)


def documented_commands() -> list[list[str]]:
    """Those of docs/scaling.md, without the program's name."""
    [block] = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [line.split()[1:] for line in block.splitlines()]


async def test_the_commands(
    mesh: Mesh,
    checkpoint: MakeCheckpoint,
    redis: Redis,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = checkpoint("mixtral")
    await mesh.replica(path, log_level="ERROR")
    router = await mesh.router(path)
    capsys.readouterr()

    async def run(*args: str) -> tuple[int, str, str]:
        code = await blocking(lambda: cli.main([*args, "--target", router.target]))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    assert await run("scaling") == (0, "no group is scaled: experts.scaling.mode is off\n", "")
    code, _, err = await run("scale", "g0", "3")
    assert code == cli.USER_ERROR
    assert "none, as experts.scaling.mode is off" in err
    own = decision()
    own.override.CopyFrom(pb.ReplicaOverride(replicas=3, left_ms=540_000))
    await redis.set(decision_key(mesh.name, "g0"), own.SerializeToString(), px=60_000)
    code, out, _ = await run("scaling")
    assert code == 0
    assert "3 set by hand, 9m left" in " ".join(out.split())
    code, out, _ = await run("scaling", "--json")
    assert json.loads(out)["groups"][0]["reason"] == "load"
    by_hand, back = documented_commands()
    assert await run(*by_hand) == (0, "g0: 3 replicas for 10m\n", "")
    assert await redis.get(override_key(mesh.name, "g0")) == b"3"
    assert await run(*back) == (0, "g0: the rule decides again\n", "")
    assert await run("scale", "g0", "--auto") == (0, "g0: nothing was set by hand\n", "")
    for args, message in (
        (("scale", "g0"), "replicas: expected a number or --auto, got neither"),
        (("scale", "g0", "3", "--auto"), "replicas: expected a number or --auto, got 3 and --auto"),
        (("scale", "g0", "3", "--for", "soon"), "--for: expected a time like 90s"),
        (("scale", "g0", "9"), "replicas: expected 1 to 4, the bounds of g0, got 9"),
    ):
        code, _, err = await run(*args)
        assert (code, message in err) == (cli.USER_ERROR, True), err
