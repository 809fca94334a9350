"""What may be asked of scaling. Imports neither torch nor Ray: the configuration has these, too."""

from typing import Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from expertmesh.runtime.config import Settings


class ScalingOptions(Settings):
    """The rule by which an expert group gets more or fewer replicas (docs/scaling.md)."""

    min_replicas: NonNegativeInt = 1
    """Replicas at least. 0 lets a cold group go, if others hold its experts."""
    max_replicas: PositiveInt = 4
    """Replicas at most."""
    within_machines: bool = True
    """Ask for no more replicas than there is memory (on the CPU, of machines that have replicas of
    the group) and GPUs for. Not where machines are added for replicas that find no room."""
    target_busy_frac: float = Field(default=0.7, gt=0, lt=1)
    """Share of its time a replica should compute; above it there will be more replicas."""
    hysteresis_frac: float = Field(default=0.2, ge=0, lt=1)
    """Share of the target by which the load has to be lower before there will be fewer."""
    max_queue_delay_s: PositiveFloat = 0.05
    """Mean time rows may wait for the start of their computation."""
    catch_up_s: PositiveFloat = 10.0
    """Time in which rows that wait longer should have been worked off."""
    up_window_s: PositiveFloat = 2.0
    """Load is averaged over this time; more replicas come within about as long."""
    down_window_s: PositiveFloat = 120.0
    """How long the load has to have been low before replicas go."""
    lead_s: NonNegativeFloat = 15.0
    """How far ahead the trend of arrivals is followed: what a replica needs to start. 0 switches
    the prediction off."""
    trend_window_s: PositiveFloat = 60.0
    """Time over which arrivals must have risen to be called a trend."""
    memory_s: PositiveFloat = 600.0
    """How long it is remembered that so few replicas let rows wait too long at such a load."""
    zero_after_s: PositiveFloat = 600.0
    """How long a group must have been without rows before it goes to 0 replicas."""

    @property
    def history_s(self) -> float:
        """How far back the rule looks."""
        return max(self.down_window_s, self.trend_window_s, self.memory_s, self.zero_after_s)

    @model_validator(mode="after")
    def _bounds_agree(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}; "
                "raise the one or lower the other"
            )
        if self.up_window_s > self.down_window_s:
            raise ValueError(
                f"up_window_s {self.up_window_s:g} is above down_window_s {self.down_window_s:g}: "
                "replicas would go sooner than they come"
            )
        return self
