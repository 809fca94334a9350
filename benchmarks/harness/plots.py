"""Figures in results/: readable in black and white, small enough for a repository."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # after the backend is chosen

from benchmarks.harness.report import RESULTS

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, distinct for colour-blind readers."""
_STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Panel:
    """Points with a band, and a line through them."""

    title: str
    x_label: str
    y_label: str
    xs: Sequence[float]
    ys: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]
    line: Callable[[float], float] | None = None
    line_label: str = field(default="")


def panels(name: str, own: Sequence[Panel]) -> str:
    """results/NAME.svg: three panels a row, log-log. Returns the file's name."""
    rows = -(-len(own) // 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(12, 3.6 * rows), squeeze=False)
    for axis, panel in zip(axes.flat, own, strict=False):
        axis.fill_between(panel.xs, panel.lows, panel.highs, color=_COLOURS[5], alpha=0.35)
        axis.plot(panel.xs, panel.ys, "o", color=_COLOURS[0], label="median, p10 to p90")
        if panel.line is not None:
            line = [panel.line(x) for x in panel.xs]
            axis.plot(panel.xs, line, "--", color=_COLOURS[1], label=panel.line_label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=10)
        axis.set_xticks(panel.xs, [f"{x:g}" for x in panel.xs], minor=False)
        axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return _save(name, figure)


def time_series(name: str, series: Mapping[str, Sequence[float]], step_s: float, label: str) -> str:
    """results/NAME.svg: one line for each series over minutes. Returns the file's name."""
    figure, axis = pyplot.subplots(figsize=(9, 4.5))
    for index, (what, values) in enumerate(series.items()):
        minutes = [step_s * (i + 1) / 60 for i in range(len(values))]
        style = _STYLES[index % len(_STYLES)]
        axis.plot(minutes, values, style, color=_COLOURS[index % len(_COLOURS)], label=what)
    axis.set(xlabel="minutes under load", ylabel=label)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=3)
    return _save(name, figure)


def _save(name: str, figure: pyplot.Figure) -> str:
    RESULTS.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.svg")
    pyplot.close(figure)
    return f"{name}.svg"
