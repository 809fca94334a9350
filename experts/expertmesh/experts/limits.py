"""Bounds and rhythms of a replica."""

from typing import Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from expertmesh.runtime.config import Settings


class BatchLimits(Settings):
    """Changed live through Serve's `user_config`."""

    max_batch_rows: PositiveInt = 4096
    """Rows in one batch at most; larger batches compute faster per row and hold memory longer."""
    max_wait_s: NonNegativeFloat = 0.0
    """How long a batch that is not full waits for more rows; 0 takes what is queued at once."""
    at_once_s: NonNegativeFloat = 0.0005
    """Rows that come to an idle replica and are expected to take no longer are computed on the
    spot, without the queue's change of threads; 0 queues everything."""
    max_queue_rows: PositiveInt = 65536
    """Rows admitted and not yet answered at most; beyond it callers get QueueFull."""
    max_queue_bytes: PositiveInt = 1 << 30
    """Bytes of the rows admitted and not yet answered at most; beyond it callers get QueueFull."""
    ageing_s: PositiveFloat = 1.0
    """Rows of priority "batch" wait while interactive ones do, but get one batch of their own each
    time they have had none for so long."""


class Heartbeats(Settings):
    """How a replica tells that it is there."""

    heartbeat_s: float = Field(default=0.2, gt=0, le=60)
    """Time between a replica's heartbeats."""
    lease_s: float = Field(default=3.0, ge=1, le=600)
    """Time after which a replica not heard from does not exist; at least two heartbeats."""

    @model_validator(mode="after")
    def _lease_outlasts_a_lost_heartbeat(self) -> Self:
        if self.lease_s < 2 * self.heartbeat_s:
            least_s = 2 * self.heartbeat_s
            raise ValueError(f"lease_s must be at least 2 * heartbeat_s, {least_s:g} s")
        return self
