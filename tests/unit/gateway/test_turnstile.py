"""Prompts wait for their turn by caller and priority; whoever leaves makes room."""

import asyncio

import pytest

from expertmesh.runtime.errors import Draining
from expertmesh.runtime.origin import Origin, Priority
from expertmesh.services.gateway.running import RunningCalls
from expertmesh.services.gateway.turnstile import Turnstile

BATCH = Priority.BATCH


class Prompts:
    """Prompts that stay inside until they are told to leave."""

    def __init__(self, max_inside: int) -> None:
        self.turnstile = Turnstile(max_inside)
        self.inside: list[str] = []
        self._leave: dict[str, asyncio.Event] = {}

    async def come(
        self, name: str, priority: Priority = Priority.INTERACTIVE
    ) -> "asyncio.Task[None]":
        """A prompt of the caller that the name begins with."""
        self._leave[name] = asyncio.Event()

        async def stay() -> None:
            async with self.turnstile.turn(Origin(name[0], priority), 10):
                self.inside.append(name)
                await self._leave[name].wait()

        task = asyncio.create_task(stay())
        await asyncio.sleep(0)
        return task

    async def leave(self, name: str) -> None:
        self._leave[name].set()
        for _ in range(3):
            await asyncio.sleep(0)


async def test_callers_take_turns_and_batch_comes_last() -> None:
    prompts = Prompts(1)
    await prompts.come("a1")
    await prompts.come("x1", BATCH)
    for name in ("a2", "a3", "b1"):
        await prompts.come(name)
    for name in ("a1", "a2", "b1", "a3", "x1"):
        assert prompts.inside[-1] == name
        await prompts.leave(name)
    assert len(prompts.inside) == 5


async def test_so_many_are_inside() -> None:
    prompts = Prompts(2)
    for name in ("a1", "a2", "a3"):
        await prompts.come(name)
    assert prompts.inside == ["a1", "a2"]
    await prompts.leave("a2")
    assert prompts.inside == ["a1", "a2", "a3"]


async def test_who_gives_up_loses_nobody_a_place() -> None:
    prompts = Prompts(1)
    first = await prompts.come("a1")
    second, third = await prompts.come("a2"), await prompts.come("a3")
    await prompts.come("a4")
    second.cancel()
    await prompts.leave("a1")
    await first
    assert prompts.inside == ["a1", "a3"]
    third.cancel()  # inside
    await asyncio.wait([third])
    await asyncio.sleep(0)
    assert prompts.inside == ["a1", "a3", "a4"]


async def test_a_turn_that_comes_while_its_prompt_gives_up_is_passed_on() -> None:
    prompts = Prompts(1)
    await prompts.come("a1")
    second = await prompts.come("a2")
    await prompts.come("a3")
    prompts._leave["a1"].set()
    await asyncio.sleep(0)  # a1 has left and let a2 in, which does not know it yet
    second.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    assert prompts.inside == ["a1", "a3"]


async def test_closing_sends_everybody_away() -> None:
    prompts = Prompts(1)
    await prompts.come("a1")
    waiting = await prompts.come("a2")
    prompts.turnstile.close()
    with pytest.raises(Draining):
        await waiting
    with pytest.raises(Draining):
        await (await prompts.come("a3"))
    await prompts.leave("a1")


def test_a_forward_belongs_to_its_only_caller_or_to_all() -> None:
    running = RunningCalls()
    assert running.origin() == Origin("gateway")
    with running.holding(Origin("a", BATCH), "trace a"):
        assert running.origin() == Origin("a", BATCH)
        with running.holding(Origin("a"), ""):
            assert running.origin() == Origin("a")
        with running.holding(Origin("b", BATCH), "trace b"):
            assert running.origin() == Origin("gateway", BATCH)
            assert running.traceparents() == ("trace a", "trace b")
    assert running.traceparents() == ()
