"""Where a replica's weights are, as its heartbeat and its metrics tell it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from expertmesh.experts.loader import ExpertLoader
from expertmesh.experts.loads import LoadCounts
from expertmesh.experts.residency import ExpertKey
from expertmesh.runtime.metrics import Metrics
from expertmesh.v1 import control_pb2


def residency_state(loader: ExpertLoader) -> control_pb2.Residency:
    """What is resident, loading and in use at one moment, and the counts so far."""
    with loader.locked() as residency:
        counts = loader.counts
        return control_pb2.Residency(
            budget_bytes=residency.budget_bytes,
            resident_bytes=residency.used_bytes,
            resident=_by_layer(residency.resident),
            loading=_by_layer(residency.loading),
            in_use=_by_layer(residency.resident & residency.pinned),
            load_time_us=counts.load_time_us,
            hits=counts.hits,
            misses=counts.misses,
        )


def resident_bits(loader: ExpertLoader, held: Sequence[ExpertKey]) -> bytes:
    """A bit for each expert held, in the order given: whether its weights are on the device."""
    with loader.locked() as residency:
        resident = residency.resident
        bits = sum(1 << place for place, key in enumerate(held) if key in resident)
    return bits.to_bytes((len(held) + 7) // 8, "little")


class ResidencyMetrics:
    """Counts for the group what its replica's loader has done since it was last asked."""

    def __init__(self, metrics: Metrics, group: str) -> None:
        self._metrics, self._group = metrics, group
        self._told = LoadCounts()
        self._told_bytes = 0

    def update(self, loader: ExpertLoader) -> None:
        """Bring the metrics up to now."""
        with loader.locked() as residency:
            now, now_bytes = replace(loader.counts), residency.used_bytes
        told, metrics, group = self._told, self._metrics, self._group
        metrics.residency_hits.add(now.hits - told.hits, group)
        metrics.residency_misses.add(now.misses - told.misses, group)
        metrics.residency_loads.add(now.loads - told.loads, group)
        metrics.residency_prefetches.add(now.prefetches - told.prefetches, group)
        metrics.residency_evictions.add(now.evictions - told.evictions, group)
        metrics.resident_bytes.add(now_bytes - self._told_bytes, group)
        self._told, self._told_bytes = now, now_bytes


def _by_layer(keys: Iterable[ExpertKey]) -> list[control_pb2.LayerExperts]:
    return [
        control_pb2.LayerExperts(layer=layer, experts=[key.expert for key in own])
        for layer, own in groupby(sorted(keys), lambda key: key.layer)
    ]
