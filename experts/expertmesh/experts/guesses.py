"""Which experts the next MoE layer will probably need: two ways to guess, each trusted only for the
layers of which it was right lately. No I/O.

Shapes: R rows, E experts, D hidden size, K experts per token.
"""

import itertools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch

from expertmesh.experts.prefetch import CoActivation
from expertmesh.experts.residency import ExpertKey

MAX_ROWS = 8
"""Batches of more rows use most experts anyway: which ones need no guess, but would cost time."""
_LEAST_RIGHT_FRAC = 0.5
"""A load that is for nothing takes a place and the link from others."""
_MEMORY = 0.98
"""What a guess weighs after the next one of its layer."""


class NextGates:
    """The next layer's gate, applied to what this layer's experts got.

    The residual stream changes little from layer to layer, so the gate often chooses as it will:
    Eliseev and Mazur, "Fast inference of mixture-of-experts language models with offloading"
    (arXiv 2312.17238). Biases and groups are left out: it is a guess.

    Args:
        layers: the MoE layers a replica holds experts of, ascending.
        gates: [E, D] of each layer of which the gate is known.
        top_k: experts per token.
    """

    def __init__(
        self, layers: Sequence[int], gates: Mapping[int, torch.Tensor], top_k: int
    ) -> None:
        self._next = dict(itertools.pairwise(layers))
        self._gates = gates
        self._top_k = top_k

    def predict(self, layer: int, rows_RD: torch.Tensor) -> list[ExpertKey]:
        """Experts of the next layer, the likeliest first; none after the last layer, whose next
        token is not known, or for many rows."""
        after = self._next.get(layer, layer)
        gate_ED = self._gates.get(after)
        if after == layer or gate_ED is None or len(rows_RD) > MAX_ROWS:
            return []
        scores_RE = rows_RD @ gate_ED.T
        top_RK = scores_RE.topk(min(self._top_k, scores_RE.shape[1]), dim=1).indices
        by_rank = top_RK.T.reshape(-1).tolist()  # every row's best before any row's second
        return [ExpertKey(after, expert) for expert in dict.fromkeys(by_rank)]


class _Record:
    """How often one way of guessing was right, layer by layer."""

    def __init__(self) -> None:
        self._open: dict[int, Collection[ExpertKey]] = {}
        self._right: dict[int, float] = defaultdict(float)
        self._guessed: dict[int, float] = defaultdict(float)

    def note(self, guess: Collection[ExpertKey]) -> None:
        """A guess, of one layer; `settle` will say how good it was."""
        for key in guess:
            self._open[key.layer] = guess

    def settle(self, layer: int, experts: Collection[int]) -> None:
        """The experts that a batch of the layer uses."""
        guess = self._open.pop(layer, ())
        if not guess:
            return
        right = sum(key.expert in experts for key in guess)
        self._right[layer] = self._right[layer] * _MEMORY + right
        self._guessed[layer] = self._guessed[layer] * _MEMORY + len(guess)

    def right_frac(self, layer: int) -> float:
        """Share of the experts guessed for the layer that were used; 0 before the first."""
        return self._right[layer] / self._guessed[layer] if self._guessed[layer] else 0.0


class Guesses:
    """What to load ahead. Not thread-safe.

    Args:
        held: experts that the replica holds: others are not guessed.
    """

    def __init__(
        self, together: CoActivation, gates: NextGates, held: Collection[ExpertKey]
    ) -> None:
        self._together, self._gates, self._held = together, gates, held
        self._records = (_Record(), _Record())

    def after(
        self, layer: int, experts: Collection[int], rows_RD: torch.Tensor
    ) -> Sequence[ExpertKey]:
        """Account a batch. Returns the experts that are worth loading for the one after it, the
        likeliest first: of the way of guessing that is right more often in that layer."""
        self._together.observe(layer, experts)
        guesses = (self._gates.predict(layer, rows_RD), self._together.predict(layer, experts))
        best: Sequence[ExpertKey] = ()
        best_frac = _LEAST_RIGHT_FRAC
        for record, guess in zip(self._records, guesses, strict=True):
            record.settle(layer, experts)
            own = [key for key in guess if key in self._held]
            record.note(own)
            if own and record.right_frac(own[0].layer) > best_frac:
                best, best_frac = own, record.right_frac(own[0].layer)
        return best
