"""One HTML page with the plots of a simulation: no script, no file beside it."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from expertmesh.services.simulator.outcome import Outcome
from expertmesh.services.simulator.report import sampled
from expertmesh.services.simulator.scenario import Scenario
from expertmesh.services.simulator.studies import Run

Floats = NDArray[np.float64]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7F7F7F", "#222222")
"""That the colour-blind can tell apart."""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 860, 220, 64, 30, 14
_BINS = 200
_UNITS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))
"""Seconds of a unit of time, and what it is called."""
_STEPS = (1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 900px; margin: 2em auto }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin: 1.6em 0 0.2em }
table { border-collapse: collapse } p { margin: 0.3em 0 } svg { width: 100%; height: auto }
td, th { padding: 0.2em 0.9em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
.note { color: #666 } text { font: 12px system-ui, sans-serif; fill: #555 }
"""
_ROWS: Sequence[tuple[str, str, str]] = (
    ("gpu_seconds", "GPU-seconds", ",.0f"),
    ("mean_replicas", "replicas in the mean", ".1f"),
    ("most_replicas", "most ready at once", ".0f"),
    ("busy_frac", "of their time busy", ".0%"),
    ("ttft_p50_s", "first token: median, s", ".2f"),
    ("ttft_p99_s", "first token: p99, s", ".2f"),
    ("token_gap_p99_s", "between tokens: p99, s", ".3f"),
    ("failed_requests", "requests failed", ".0f"),
)

Line = tuple[str, Floats, Floats]
"""Its name, times in seconds, values."""


def page(scenario: Scenario, runs: Mapping[str, Run]) -> str:
    """The page of simulations of the same requests, by name."""
    first = next(iter(runs.values()))
    load = ("tokens", *_per_second(first.outcome))
    replicas = [
        (name, _times(run.outcome), np.array([float(sum(own)) for own in run.outcome.series.ready]))
        for name, run in runs.items()
    ]
    late = [(name, *_ttft_p99(run.outcome)) for name, run in runs.items()]
    waiting = [
        (name, _times(run.outcome), np.array(run.outcome.series.waiting_tokens))
        for name, run in runs.items()
    ]
    groups = [
        (
            f"g{group}",
            _times(first.outcome),
            np.array([own[group] for own in first.outcome.series.ready], float),
        )
        for group in range(min(scenario.mesh.groups, len(_COLOURS)))
    ]
    promised_s = scenario.objective.ttft_p99_s
    end_s = max((float(_times(run.outcome)[-1]) for run in runs.values()), default=1.0) or 1.0
    first_groups = f"Ready replicas of the first groups ({next(iter(runs))})"
    parts = [
        _plot("Tokens that passed through the model, per second", [load], end_s),
        _plot("Ready replicas of the mesh", replicas, end_s),
        _plot(first_groups, groups, end_s),
        _plot("First token, p99 of the requests of each interval, s", late, end_s, promised_s),
        _plot("Prompt tokens that wait at gateways", waiting, end_s),
    ]
    about = (
        f"{len(first.outcome.arrivals):,} requests; {scenario.mesh.groups} groups of "
        f"{scenario.model.experts} experts in {scenario.model.layers} layers; "
        f"{escape(scenario.mesh.gpus)}; seed {scenario.seed}. "
        f"{escape(sampled(scenario, first.numbers))}"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>expertmesh simulate</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>Simulation</h1>\n<p class=note>{about}</p>\n{_table(runs)}\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _table(runs: Mapping[str, Run]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in runs)
    rows = "".join(
        f"<tr><td>{what}</td>"
        + "".join(f"<td>{run.numbers[key]:{form}}</td>" for run in runs.values())
        + "</tr>"
        for key, what, form in _ROWS
    )
    promised_s = next(iter(runs.values())).scenario.objective.ttft_p99_s
    verdicts = "".join(
        f"<td>{'met' if run.meets_objective else '<b>missed</b>'}</td>" for run in runs.values()
    )
    rows += f"<tr><td>first token: p99 of at most {promised_s:g} s</td>{verdicts}</tr>"
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def _times(outcome: Outcome) -> Floats:
    return np.array(outcome.series.at_s)


def _per_second(outcome: Outcome) -> tuple[Floats, Floats]:
    at_s, tokens = _times(outcome), np.array(outcome.series.tokens)
    every = max(1, len(at_s) // _BINS)
    at_s, tokens = at_s[::every], tokens[::every]
    return at_s[1:], np.diff(tokens) / np.maximum(np.diff(at_s), 1e-9)


def _ttft_p99(outcome: Outcome) -> tuple[Floats, Floats]:
    edges = np.linspace(0, outcome.arrivals.duration_s or 1.0, _BINS // 2 + 1)
    places = np.searchsorted(outcome.arrivals.times_s, edges)
    at_s, found = [], []
    for number, (first, last) in enumerate(pairwise(places)):
        own = outcome.ttft_s[first:last]
        own = own[np.isfinite(own)]
        if len(own):
            at_s.append(edges[number + 1])
            found.append(float(np.quantile(own, 0.99)))
    return np.array(at_s), np.array(found)


def _plot(title: str, lines: Sequence[Line], end_s: float, promised: float | None = None) -> str:
    """Lines over time; all plots of a page end at the same time.

    Args:
        promised: a level that values should stay below.
    """
    drawn = [line for line in lines if len(line[1])]
    levels = [float(values.max()) for _, _, values in drawn]
    most = _round_up(max([*levels, promised or 0.0], default=1.0))
    right, base = _WIDTH - 10, _HEIGHT - _BOTTOM

    def x(at_s: float) -> float:
        return _LEFT + (right - _LEFT) * at_s / end_s

    def y(value: float) -> float:
        return base - (base - _TOP) * value / most

    parts = [_grid(x, y, end_s, most)]
    if promised is not None:
        parts.append(
            f'<path d="M{_LEFT} {y(promised):.1f}H{right}" stroke="#222" stroke-dasharray="5 4"/>'
            f'<text x="{right}" y="{y(promised) - 5:.1f}" text-anchor="end">promised</text>'
        )
    for (_, times, values), colour in zip(drawn, _COLOURS * 9, strict=False):
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(times, values, strict=True))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
    names = [name for name, _, _ in drawn] if len(drawn) > 1 else []
    legend = " &nbsp; ".join(
        f'<span style="color:{colour}">&#9632;</span> {escape(name)}'
        for name, colour in zip(names, _COLOURS * 9, strict=False)
    )
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'
    return f"<h2>{escape(title)}</h2>\n{svg}\n<p class=note>{legend}</p>"


def _grid(
    x: Callable[[float], float], y: Callable[[float], float], end_s: float, most: float
) -> str:
    unit_s, unit = next(own for own in _UNITS if end_s > 5 * own[0] or own[0] == 1)
    step = _round_up(end_s / unit_s / 8)
    parts = []
    for number in range(5):
        value = most * number / 4
        parts.append(
            f'<path d="M{_LEFT} {y(value):.1f}H{_WIDTH - 10}" stroke="#e4e4e4"/><text '
            f'x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{_short(value)}</text>'
        )
    for number in range(int(end_s / unit_s / step) + 1):
        at_s = number * step * unit_s
        label = f"{number * step:g}" + (f" {unit}" if number == 0 else "")
        parts.append(
            f'<text x="{x(at_s):.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{label}</text>'
        )
    return "".join(parts)


def _round_up(value: float) -> float:
    """The next of _STEPS times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in _STEPS if value <= step * power * (1 + 1e-9))


def _short(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
