"""Which experts the next MoE layer will probably need, by what was used together lately. Pure."""

from collections import defaultdict, deque
from collections.abc import Collection, Sequence

from expertmesh.experts.residency import ExpertKey

_DECAY = 0.95
"""What a sighting weighs after the next batch with the same expert."""
_WINDOW = 4
"""Batches to look back: those of several callers alternate."""
_MIN_SHARE = 0.3
"""An expert that follows more rarely is not worth a load that may be for nothing."""


class CoActivation:
    """Counts, for each expert, how often each expert of the next layer was used right after it.

    The layer after the last is the first: of the next token.

    Args:
        layers: the MoE layers a replica holds experts of, ascending.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self._next = dict(zip(layers, [*layers[1:], layers[0]], strict=True))
        self._follows: dict[ExpertKey, dict[int, float]] = defaultdict(dict)
        self._seen: dict[ExpertKey, float] = defaultdict(float)
        self._recent: deque[tuple[int, tuple[int, ...]]] = deque(maxlen=_WINDOW)

    def observe(self, layer: int, experts: Collection[int]) -> None:
        """Account one batch. It follows the newest of the last few that was of the layer before."""
        for before, own in reversed(self._recent):
            if self._next[before] == layer:
                for expert in own:
                    self._follow(ExpertKey(before, expert), experts)
                break
        self._recent.append((layer, tuple(experts)))

    def _follow(self, key: ExpertKey, experts: Collection[int]) -> None:
        follows = self._follows[key]
        for expert in follows:
            follows[expert] *= _DECAY
        for expert in experts:
            follows[expert] = follows.get(expert, 0.0) + 1
        self._seen[key] = self._seen[key] * _DECAY + 1

    def predict(self, layer: int, experts: Collection[int]) -> list[ExpertKey]:
        """Experts of the next layer that probably follow a batch, the likeliest first.

        How often one followed each expert of the batch, in the mean over them. Beside the largest
        share, the mean hit as often with half the loads (the demo model's routing, replayed).
        """
        shares: dict[int, float] = defaultdict(float)
        for before in experts:
            key = ExpertKey(layer, before)
            for expert, weight in self._follows.get(key, {}).items():
                shares[expert] += weight / self._seen[key] / len(experts)
        likely = [expert for expert, share in shares.items() if share >= _MIN_SHARE]
        likely.sort(key=lambda expert: (-shares[expert], expert))
        return [ExpertKey(self._next[layer], expert) for expert in likely]
