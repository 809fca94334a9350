"""How often each expert is chosen, by layer and time. Pure but for `read_counts`.

L layers, E experts. A popularity is [L, E]: the share of a layer's rows that go to each expert.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from expertmesh.runtime.errors import InvalidInput
from expertmesh.services.simulator.scenario import ModelSettings, PopularitySettings

Shares = NDArray[np.float64]


class Popularity:
    """The popularity at any time.

    Args:
        phases: [L, E] each, one after the other, and again from the first.
        phase_s: how long each lasts; 0: the first one lasts for ever.
    """

    def __init__(self, phases: list[Shares], phase_s: float) -> None:
        self._phases = phases
        self._phase_s = phase_s

    def phase(self, now_s: float) -> int:
        """Which of the phases it is."""
        return int(now_s // self._phase_s) if self._phase_s else 0

    def shares_LE(self, phase: int) -> Shares:
        """Share of each layer's rows by expert."""
        return self._phases[phase % len(self._phases)]


def make_popularity(
    settings: PopularitySettings,
    model: ModelSettings,
    duration_s: float,
    random: np.random.Generator,
    folder: Path,
) -> Popularity:
    """What the scenario says.

    Args:
        duration_s: how long drift must go on.
        folder: from which a relative file counts.

    Raises:
        InvalidInput: the counts are not those of a model with these layers and experts.
    """
    if settings.kind == "counts":
        assert settings.file is not None
        phases = read_counts(folder / settings.file, model)
        return Popularity(phases if settings.drift_s else phases[:1], settings.drift_s)
    first = _drawn(settings, model, random)
    phases = [_even_out(first, model.top_k)]
    count = int(duration_s // settings.drift_s) + 1 if settings.drift_s else 1
    for _ in range(min(count, 10_000) - 1):
        first = _drifted(first, settings, random)
        phases.append(_even_out(first, model.top_k))
    return Popularity(phases, settings.drift_s)


def _drawn(
    settings: PopularitySettings, model: ModelSettings, random: np.random.Generator
) -> Shares:
    shape = (model.layers, model.experts)
    if settings.kind == "uniform":
        return np.ones(shape)
    own = 1 if settings.layers == "alike" else model.layers
    if settings.kind == "zipf":
        weights = np.arange(1, model.experts + 1) ** -settings.exponent
        drawn = np.array([random.permutation(weights) for _ in range(own)])
    else:
        drawn = random.lognormal(0, settings.sigma, (own, model.experts))
    return np.broadcast_to(drawn, shape).copy()


def _drifted(before: Shares, settings: PopularitySettings, random: np.random.Generator) -> Shares:
    after = before.copy()
    num_experts = before.shape[1]
    moved = max(2, round(settings.drift_frac * num_experts))
    picks = random.permutation(num_experts)[:moved]
    for layer in range(len(after)):
        if settings.layers == "own":
            picks = random.permutation(num_experts)[:moved]
        after[layer, picks] = after[layer, np.roll(picks, 1)]
    return after


def _even_out(weights: Shares, top_k: int) -> Shares:
    """Shares of rows: a token chooses an expert at most once, so none has more than 1 / top_k."""
    shares = weights / weights.sum(1, keepdims=True)
    for _ in range(top_k):
        over = np.minimum(shares, 1 / top_k)
        rest = 1 - over.sum(1, keepdims=True)
        below = np.where(shares < 1 / top_k, shares, 0.0)
        total = below.sum(1, keepdims=True)
        shares = over + np.where(total > 0, below * rest / np.where(total > 0, total, 1), 0.0)
    even: Shares = shares / shares.sum(1, keepdims=True)
    return even


def read_counts(path: Path, model: ModelSettings) -> list[Shares]:
    """[L, E] of each subject of a file of counts, in the file's order.

    Raises:
        InvalidInput: not such a file, or counts of a model with other layers or experts.
    """
    form = "JSON with subjects: {name: {expert_popularity: [layer][expert]}}"
    try:
        subjects = json.loads(path.read_text("utf-8"))["subjects"]
        found = {name: np.array(own["expert_popularity"], float) for name, own in subjects.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        got = f"{path}: {error}"
        raise InvalidInput.of("popularity.file", expected=form, got=got) from None
    if not found:
        raise InvalidInput.of("popularity.file", expected=form, got=f"{path}: no subjects")
    for name, counts in found.items():
        _check_counts(name, counts, model)
    return [_even_out(counts, model.top_k) for counts in found.values()]


def _check_counts(name: str, counts: Shares, model: ModelSettings) -> None:
    wanted = (model.layers, model.experts)
    if counts.shape != wanted:
        raise InvalidInput.of(
            f"popularity.file: {name}",
            expected=f"{wanted[0]} layers of {wanted[1]} experts, as the model has",
            got=" x ".join(map(str, counts.shape)),
        )
    if not np.isfinite(counts).all() or counts.min() < 0 or counts.sum(1).min() <= 0:
        layer = int(np.argmin(np.where(counts.min(1) < 0, -1.0, counts.sum(1))))
        raise InvalidInput.of(
            f"popularity.file: {name}",
            expected="counts of 0 or more, some above 0 in each layer",
            got=f"layer {layer}: {counts[layer].tolist()}",
        )
