"""Draws stacks as a flame graph: an SVG without scripts, small enough for a repository. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from xml.sax.saxutils import escape

from benchmarks.harness.stacks import Frame, Stacks

_WIDTH = 1200
_ROW = 16
_HEAD = 44
_FONT = 11
_CHARACTER = 6.7
"""Width of a letter; all in pixels."""
_LEAST_FRAC = 0.002
"""Narrower boxes are left out."""

COLOURS: Mapping[str, str] = {
    "ours": "#F2A65A",
    "torch": "#E8836B",
    "transformers": "#C7A0D8",
    "grpc, asyncio, uvloop": "#8DB8E2",
    "everything else": "#D3D3D3",
}
_KINDS = {
    "expertmesh": "ours",
    "benchmarks": "ours",
    "torch": "torch",
    "transformers": "transformers",
    **dict.fromkeys(("grpc", "asyncio", "uvloop"), "grpc, asyncio, uvloop"),
}


@dataclass
class _Node:
    weight: float = 0.0
    below: "dict[Frame, _Node]" = field(default_factory=dict)


class _Box(NamedTuple):
    frame: Frame
    depth: int
    left_frac: float
    frac: float
    weight_s: float


def flame_graph(title: str, stacks: Stacks) -> str:
    """The SVG. The root is at the bottom; siblings stand by weight, the heaviest on the left."""
    root = _tree(stacks)
    boxes = list(_boxes(root, Frame(title), 0, 0.0, root.weight))
    height = _HEAD + _ROW * (1 + max(box.depth for box in boxes))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'font-family="monospace" font-size="{_FONT}">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#FFFFFF"/>',
        *_head(title),
        *(_drawn(box, height) for box in boxes),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _tree(stacks: Stacks) -> _Node:
    root = _Node()
    for stack, weight in stacks.items():
        node = root
        node.weight += weight
        for frame in stack:
            node = node.below.setdefault(frame, _Node())
            node.weight += weight
    return root


def _boxes(node: _Node, frame: Frame, depth: int, left_frac: float, total: float) -> Iterator[_Box]:
    frac = node.weight / total
    if frac < _LEAST_FRAC:
        return
    yield _Box(frame, depth, left_frac, frac, node.weight)
    for below, child in sorted(node.below.items(), key=lambda item: -item[1].weight):
        yield from _boxes(child, below, depth + 1, left_frac, total)
        left_frac += child.weight / total


def _head(title: str) -> Iterator[str]:
    yield f'<text x="4" y="15" font-size="14">{escape(title)}</text>'
    left = 4.0
    for kind, colour in COLOURS.items():
        yield f'<rect x="{left:.0f}" y="24" width="10" height="10" fill="{colour}"/>'
        yield f'<text x="{left + 14:.0f}" y="33">{kind}</text>'
        left += 34 + _CHARACTER * len(kind)


def _drawn(box: _Box, height: int) -> str:
    x, width = box.left_frac * _WIDTH, box.frac * _WIDTH
    y = height - _ROW * (box.depth + 1)
    colour = COLOURS[_KINDS.get(box.frame.module.split("/")[0], "everything else")]
    told = f"{escape(str(box.frame))}: {box.frac:.1%}, {box.weight_s:.2f} CPU s"
    shape = f'x="{x:.1f}" y="{y}" width="{max(width - 0.5, 0.5):.1f}" height="{_ROW - 1}"'
    return (
        f'<g><title>{told}</title><rect {shape} fill="{colour}"/>'
        f"{_label(box.frame, x, y, width)}</g>"
    )


def _label(frame: Frame, x: float, y: int, width: float) -> str:
    room = int((width - 6) / _CHARACTER)
    if room < 3:
        return ""
    short = frame.function.rsplit(".", 1)[-1]
    names = (str(frame), frame.function, short)
    text = next((name for name in names if len(name) <= room), short[: room - 1] + "…")
    return f'<text x="{x + 3:.1f}" y="{y + 12}">{escape(text)}</text>'
