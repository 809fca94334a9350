"""What runs the model: the Engine protocol and the choice between its implementations."""

import logging
from collections.abc import AsyncGenerator
from typing import Any, Literal, Protocol

from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.missing_experts import DegradedMass
from expertmesh.services.forward_scope import Serving, to_nobody
from expertmesh.services.gateway.continuous import ContinuousEngine, why_not_continuous
from expertmesh.services.gateway.engine_config import EngineConfig
from expertmesh.services.gateway.exact import ExactEngine
from expertmesh.services.gateway.sampling import GenerationRequest

_log = logging.getLogger(__name__)
EngineKind = Literal["auto", "continuous", "exact"]


class Engine(Protocol):
    """Generates tokens for many requests at once."""

    @property
    def max_positions(self) -> int | None:
        """Tokens a request may have at most by the engine's memory; None: no limit of its own."""
        ...

    async def start(self) -> None:
        """Allocates what it needs; call it once, from the event loop that will submit."""
        ...

    def is_alive(self) -> bool:
        """Whether it can take requests: false once it has failed for good or is closed."""
        ...

    def submit(
        self, request: GenerationRequest, degraded: DegradedMass | None = None
    ) -> AsyncGenerator[list[int], None]:
        """The new token ids of each step, the end-of-sequence token included.

        Args:
            degraded: counts what missing experts cost the request.

        Ends after max_new_tokens or an end-of-sequence token. Closing it earlier frees its slot.

        Raises:
            QueueFull: too many requests are waiting.
            Draining: the engine is being closed.
            ExpertMeshError: the forward failed, for example ExpertUnavailable.
            InternalError: a bug; the log has it.
        """
        ...

    async def close(self, drain_s: float = 0.0) -> None:
        """Takes nothing new, lets running requests end for `drain_s` seconds, fails the rest."""
        ...


def choose_engine(
    model: Any, kind: EngineKind, config: EngineConfig, serving: Serving = to_nobody
) -> Engine:
    """The engine of that kind over `model`; "auto" is continuous batching where it can be.

    Args:
        serving: tells the model's experts whom a forward is for.

    Raises:
        ConfigError: "continuous" for a model that transformers' continuous batching cannot run.
    """
    reason = why_not_continuous(model)
    if kind == "exact" or (kind == "auto" and reason):
        if kind == "auto":
            _log.warning("one request at a time: no continuous batching, because %s", reason)
        return ExactEngine(model, config, serving)
    if reason:
        raise ConfigError.of(
            "engine", expected="'exact' or 'auto' for this model", got=f"'continuous': {reason}"
        )
    return ContinuousEngine(model, config, serving)
