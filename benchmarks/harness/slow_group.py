"""Expert groups whose replicas have a device of their own, on Ray Serve.

Replicas of one machine share its cores, so a group that grows would gain nothing. These sleep for
each row after having computed it: a device that takes so long, whatever the others do. The time is
in the environment, as it is no argument of a group.
"""

import os
import time

import torch
from ray import serve

from expertmesh.experts.batch import PackedRows
from expertmesh.experts.deployment import ExpertGroup, ExpertGroupArgs, build_with

IMPORT_PATH = "benchmarks.harness.slow_group:build"
ROW_S = "BENCH_DEVICE_ROW_S"
"""Variable: seconds that the device takes for a row."""


class SlowGroup(ExpertGroup):
    """See the module."""

    async def __init__(self, args: ExpertGroupArgs) -> None:  # type: ignore[misc]
        await super().__init__(args)
        assert self._replica
        batcher, row_s = self._replica._batcher, float(os.environ[ROW_S])
        compute = batcher._compute

        def slowly(rows: PackedRows) -> torch.Tensor:
            started_s = time.perf_counter()
            rows_RD = compute(rows)
            time.sleep(max(0.0, rows.num_rows * row_s - (time.perf_counter() - started_s)))
            return rows_RD

        batcher._compute = slowly
        batcher.stats.row_time_us = row_s * 1e6  # never short enough for the event loop


def build(args: ExpertGroupArgs) -> serve.Application:
    """As `expertmesh.experts.deployment:build`."""
    return build_with(SlowGroup, args)
