"""Bounds of a replica's queue and batches."""

from pydantic import NonNegativeFloat, PositiveInt

from expertmesh.runtime.config import Settings


class BatchLimits(Settings):
    """Changed live through Serve's `user_config`."""

    max_batch_rows: PositiveInt = 4096
    """Rows in one batch at most; larger batches compute faster per row and hold memory longer."""
    max_wait_s: NonNegativeFloat = 0.0
    """How long a batch that is not full waits for more rows; 0 takes what is queued at once."""
    max_queue_rows: PositiveInt = 65536
    """Rows admitted and not yet answered at most; beyond it callers get QueueFull."""
