"""What Serve's `user_config` of an expert group may hold: all that changes without a restart."""

from typing import Literal

from pydantic import PositiveInt

from expertmesh.experts.limits import BatchLimits
from expertmesh.experts.scaling_options import ScalingOptions


class GroupScaling(ScalingOptions):
    """The rule of scaling of a group that has one."""

    mode: Literal["advisory", "on"] = "advisory"
    """"advisory" decides and tells, "on" also does it."""


class LiveConfig(BatchLimits):
    """Limits, and the rule of scaling. The latter rides on the replicas' load reports to where the
    rule is applied: arguments of a Serve policy cannot change without restarting every replica."""

    device_memory_bytes: PositiveInt | None = None
    """Budget for weights of a replica that does not hold all experts, instead of the one it was
    started with; such a replica does not become one that holds all, nor the other way round."""
    scaling: GroupScaling | None = None
    """None where replicas are not scaled."""

    @property
    def limits(self) -> BatchLimits:
        """The part that is the replica's own."""
        return BatchLimits(**self.model_dump(exclude={"scaling", "device_memory_bytes"}))
