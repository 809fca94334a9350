"""How all plots look: colours that the colour-blind can tell apart, fonts that can be read."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.harness.report import RESULTS

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
GREY, BLACK = "#7F7F7F", "#222222"
_COLOURS = (BLUE, ORANGE, GREEN, PINK, GREY, BLACK)
_DASHES = ("-", "--", "-.", ":")
_STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "expertmesh",  # the same plot is the same file
}


@contextmanager
def figure(name: str, *, width_inch: float, height_inch: float) -> Iterator[Figure]:
    """A figure to draw into, written to results/NAME when the block ends."""
    with mpl.rc_context(_STYLE):
        drawn = Figure(figsize=(width_inch, height_inch), layout="constrained")
        yield drawn
        RESULTS.mkdir(exist_ok=True)
        drawn.savefig(RESULTS / name, metadata={"Date": None})


def time_series(name: str, series: Mapping[str, Sequence[float]], step_s: float, label: str) -> str:
    """results/NAME.svg: one line for each series over minutes under load. Returns the file's name.

    Args:
        step_s: between two values of a series; the first comes one step after the start.
        label: of the values, with their unit.
    """
    file = f"{name}.svg"
    with figure(file, width_inch=8, height_inch=4.2) as drawn:
        axes = drawn.subplots()
        looks = zip(series.items(), cycle(_COLOURS), cycle(_DASHES), strict=False)
        for (what, values), colour, dashes in looks:
            minutes = [step_s * (number + 1) / 60 for number in range(len(values))]
            axes.plot(minutes, values, dashes, color=colour, label=what)
        axes.set(xlabel="minutes under load", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        drawn.legend(loc="outside lower center", ncols=min(len(series), 6))
    return file
