"""A circuit breaker: asks replicas that were set aside for one row, until they answer.

Closed is a replica in the snapshot's holders, open one that is set aside until a probe, half-open
one while its probe is under way (Nygard, "Release It!", 2007).
"""

import asyncio
import logging
from collections.abc import Callable
from random import Random

from expertmesh.router.shipping import Shipper
from expertmesh.router.snapshot import Life, Replica
from expertmesh.router.streams import Answer
from expertmesh.runtime.errors import CorruptAnswer, ExpertMeshError
from expertmesh.runtime.tensors import torch_dtype
from expertmesh.v1 import expert_pb2

logger = logging.getLogger(__name__)

FIRST_WAIT_S = 0.05
MOST_WAIT_S = 2.0
PROBE_TIMEOUT_S = 1.0


class Prober:
    """Probes replicas with growing, jittered pauses between the tries.

    Args:
        replica: as the newest snapshot has it; None once it is gone.
        on_answer: told whose probe was answered.
    """

    def __init__(
        self,
        shipper: Shipper,
        replica: Callable[[Life], Replica | None],
        on_answer: Callable[[Life], None],
        random: Random,
    ) -> None:
        self._shipper = shipper
        self._replica = replica
        self._on_answer = on_answer
        self._random = random
        self._tasks: dict[Life, asyncio.Task[None]] = {}

    def watch(self, life: Life) -> None:
        """Probe it until it answers or is gone."""
        if life not in self._tasks:
            task = asyncio.get_running_loop().create_task(self._probe_until_answered(life))
            self._tasks[life] = task
            task.add_done_callback(lambda _: self._tasks.pop(life, None))

    async def _probe_until_answered(self, life: Life) -> None:
        wait_s = FIRST_WAIT_S
        while True:
            await asyncio.sleep(wait_s * self._random.uniform(0.5, 1.5))
            wait_s = min(2 * wait_s, MOST_WAIT_S)
            replica = self._replica(life)
            if replica is None or not replica.set_aside or replica.aside_until != "probe":
                return
            try:
                await self._probe(replica)
            except ExpertMeshError as error:
                logger.debug("replica %s fails its probe: %s", replica.name, error.message)
            else:
                logger.info("replica %s answers again and gets work", replica.name)
                self._on_answer(life)
                return

    async def _probe(self, replica: Replica) -> None:
        """One row of zeros on a connection of its own; raises what goes wrong."""
        stream = self._shipper.new_stream(replica)
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def on_answer(answer: Answer | ExpertMeshError) -> None:
            if answered.done():
                return
            if isinstance(answer, ExpertMeshError):
                answered.set_exception(answer)
            else:
                answered.set_result(answer)

        num_bytes = replica.state.hidden_size * torch_dtype(replica.state.dtype).itemsize
        try:
            row = memoryview(bytes(num_bytes))
            stream.send(
                _one_row(replica, self._shipper.model), [row], 1, PROBE_TIMEOUT_S, on_answer
            )
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                _, payload = await answered
            if len(payload) != num_bytes:
                raise CorruptAnswer(
                    f"a probe of {num_bytes} bytes was answered with {len(payload)}"
                )
        except TimeoutError:
            raise ExpertMeshError(f"no answer within {PROBE_TIMEOUT_S} s") from None
        finally:
            await stream.close()

    async def close(self) -> None:
        """Probe no more."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _one_row(replica: Replica, model: str) -> expert_pb2.ComputeRequest:
    """Through the first expert it holds; one that is on its device if it says so."""
    held = replica.state.holds[0]
    resident = replica.resident_in(held.layer)
    experts = [own for own in held.experts if resident is None or own in resident]
    return expert_pb2.ComputeRequest(
        model=model,
        layer=held.layer,
        experts=(experts or held.experts)[:1],
        rows_per_expert=[1],
        dtype=replica.state.dtype,
        hidden_size=replica.state.hidden_size,
    )
