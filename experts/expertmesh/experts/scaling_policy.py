"""The autoscaling policy that Serve calls: as little as possible, and it never raises.

Serve pickles this module by value, so it holds nothing and imports what it needs when it is called.
A policy that raises stops Serve's control loop for every application after it.
"""

import logging
from typing import Any


class ScalingPolicy:
    """One group's; Serve makes one each time it deploys the group.

    Args:
        arguments: `group`, `mesh`, `redis_url`, `redis_secrets`, `otlp_endpoint` and `num_gpus` of
            `ScalingDesk`. A change restarts the group's replicas; the rule's own fields are in
            `user_config`.
    """

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments
        self._autoscaler: Any = None
        self._failed = ""

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """(replicas wanted, no state)."""
        try:
            if self._autoscaler is None:
                self._autoscaler = self._made()
            return self._autoscaler.replicas(context), {}
        except Exception as error:
            if self._failed != repr(error):
                self._failed = repr(error)
                logging.getLogger(__name__).exception("no scaling; the replicas there are stay")
            return context.target_num_replicas, {}

    def _made(self) -> Any:
        from expertmesh.experts.autoscaler import Autoscaler
        from expertmesh.experts.scaling_desk import ScalingDesk

        return Autoscaler(self._arguments["group"], ScalingDesk(**self._arguments))
