"""Files that say how often each expert is used, and what GPUs cost."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path

import yaml

from expertmesh.runtime.errors import ConfigError
from expertmesh.v1 import control_pb2

HEADER = ("layer", "expert", "rows")
_MOST_NAMED = 5

Popularity = dict[int, list[float]]
"""layer -> rows of each expert"""


def read_popularity(file: Path, num_experts: Mapping[int, int]) -> Popularity:
    """A CSV file of `layer,expert,rows`, as `expertmesh status --usage` prints it.

    Experts that are not in it have no rows. Rows may be fractions: only proportions count.

    Args:
        num_experts: experts of each MoE layer of the model.

    Raises:
        ConfigError: names the lines that are wrong, or the layers or experts the model has not.
    """
    found: Popularity = {layer: [0.0] * count for layer, count in num_experts.items()}
    bad: list[str] = []
    for number, cells in _lines(file):
        problem = _take(cells, found)
        if problem:
            bad.append(f"line {number}: {problem}")
    if bad:
        more = f"; and {len(bad) - _MOST_NAMED} lines more" if len(bad) > _MOST_NAMED else ""
        raise ConfigError(
            f"{file}: {'; '.join(bad[:_MOST_NAMED])}{more}", file=file, lines=len(bad)
        )
    if not any(map(any, found.values())):
        raise ConfigError.of(f"{file}", expected="rows of at least one expert", got="none")
    return found


def _lines(file: Path) -> list[tuple[int, list[str]]]:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            reader = csv.reader(stream)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{file}: cannot be read: {error}", file=file) from error
    if not lines or tuple(lines[0][1]) != HEADER:
        got = ",".join(lines[0][1]) if lines else "an empty file"
        raise ConfigError.of(f"{file}: line 1", expected=",".join(HEADER), got=got)
    return [(number, cells) for number, cells in lines[1:] if any(cells)]


def _take(cells: list[str], found: Popularity) -> str:
    """Add one line; what is wrong with it, or ""."""
    if len(cells) != len(HEADER):
        return f"expected {len(HEADER)} values, got {len(cells)}"
    try:
        layer, expert, rows = int(cells[0]), int(cells[1]), float(cells[2])
    except ValueError:
        return f"expected two whole numbers and a number, got {','.join(cells)!r}"
    if layer not in found:
        return f"layer {layer}: the model's layers with experts are {_span(list(found))}"
    if not 0 <= expert < len(found[layer]):
        return f"layer {layer}, expert {expert}: it has experts 0 to {len(found[layer]) - 1}"
    if not (math.isfinite(rows) and rows >= 0):
        return f"rows: expected 0 or more, got {cells[2]}"
    found[layer][expert] += rows
    return ""


def _span(layers: list[int]) -> str:
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def usage_csv(usage: control_pb2.GetExpertUsageResponse) -> str:
    """What a router or gateway has routed, as `read_popularity` reads it."""
    lines = [",".join(HEADER)]
    for layer in usage.layers:
        lines += [f"{layer.layer},{expert},{rows}" for expert, rows in enumerate(layer.rows)]
    return "\n".join(lines)


def read_prices(file: Path) -> dict[str, float]:
    """A YAML file of prices of an hour of each GPU, like `a100: 1.80`, in any one currency.

    Raises:
        ConfigError: names what is wrong.
    """
    try:
        prices = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(prices, dict) or not prices:
        raise ConfigError.of(f"{file}", expected="lines like `a100: 1.80`", got=repr(prices))
    for name, price in prices.items():
        is_number = isinstance(price, int | float) and not isinstance(price, bool)
        if not is_number or not math.isfinite(price) or price < 0:
            raise ConfigError.of(f"{file}: {name}", expected="a price of an hour", got=repr(price))
    return {str(name).lower(): float(price) for name, price in prices.items()}
