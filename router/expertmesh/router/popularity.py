"""How many rows each expert gets in a window of time, and how much of that is chance. Pure.

An exponentially weighted mean over windows. Its noise is measured, because tokens of one text are
not independent: half the squared difference of successive windows is the variance of one (von
Neumann et al., "The mean square successive difference", 1941), and a real change counts in it only
once. It is at least that of independent rows.
"""

from collections.abc import Mapping, Sequence
from math import log, sqrt


class LayerPopularity:
    """Of one layer.

    Args:
        half_life_windows: after so many windows a window counts half.
    """

    def __init__(self, num_experts: int, half_life_windows: float) -> None:
        self._share = 1 - 0.5 ** (1 / half_life_windows)
        self._num_windows = 0
        self._last = [0.0] * num_experts
        self._variance = [0.0] * num_experts
        self.rows = [0.0] * num_experts
        """Of each expert, in a window."""

    @property
    def is_known(self) -> bool:
        """Whether there was a window with rows."""
        return self._num_windows > 0

    def observe(self, rows: Sequence[float]) -> None:
        """Count a window. One without rows says nothing about which experts are popular."""
        if not sum(rows):
            return
        self._num_windows += 1
        share = max(self._share, 1 / self._num_windows)  # the first windows count alike
        for expert, count in enumerate(rows):
            self.rows[expert] += share * (count - self.rows[expert])
            if self._num_windows > 1:
                squared = (count - self._last[expert]) ** 2 / 2
                spread = max(self._share, 1 / (self._num_windows - 1))
                self._variance[expert] += spread * (squared - self._variance[expert])
        self._last = list(rows)

    def noise(self, num_replicas: int) -> float:
        """By how much chance alone may raise the highest of the replicas' loads over their mean.

        The highest of G normal deviates is about sqrt(2 ln G).
        """
        total = sum(self.rows)
        if not total:
            return 0.0
        pairs = zip(self._variance, self.rows, strict=True)
        variance = sum(max(own, rows) for own, rows in pairs)
        share = max(self._share, 1 / self._num_windows)
        of_mean = variance * share / (2 - share)
        return sqrt(2 * log(max(num_replicas, 2)) * num_replicas * of_mean) / total


class Popularity:
    """Of all layers."""

    def __init__(self, num_experts: Mapping[int, int], half_life_windows: float) -> None:
        self.layers = {
            layer: LayerPopularity(count, half_life_windows) for layer, count in num_experts.items()
        }

    def observe(self, rows: Mapping[int, Sequence[float]]) -> None:
        """Count a window: layer -> rows of each expert."""
        for layer, own in rows.items():
            self.layers[layer].observe(own)

    def known(self) -> dict[int, list[float]]:
        """Layer -> rows of each expert in a window, of the layers that had some."""
        return {layer: list(own.rows) for layer, own in self.layers.items() if own.is_known}
