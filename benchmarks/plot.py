"""Small multiples of lines on two logarithmic axes, as one SVG: all that the pictures of docs/ need."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

# Colours that differ for readers who see red and green alike (Okabe & Ito 2008).
COLOURS = ("#000000", "#0072b2", "#56b4e9", "#009e73", "#d55e00", "#e69f00", "#cc79a7", "#999999")
WIDTH, HEIGHT, LEFT, TOP = 400, 260, 62, 30
GAP = 24
Panel = tuple[str, Mapping[str, Sequence[tuple[float, float]]]]


def _bytes(value: float) -> str:
    return f"{value / 1e6:g} MB" if value >= 1e6 else f"{value / 1e3:g} kB"


def line_chart(
    panels: Sequence[Panel],
    x_title: str,
    y_title: str,
    most: float,
    columns: int = 2,
    x_label: Callable[[float], str] = _bytes,
) -> str:
    """An SVG document: a panel for each title, a line for each name, one legend for all. Values above `most` are drawn
    at the top.
    """
    names = list(dict.fromkeys(name for _, lines in panels for name in lines))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(sorted(names, key=_reference_first))}
    rows = -(-len(panels) // columns)
    width = columns * (WIDTH + LEFT + GAP)
    height = rows * (HEIGHT + TOP + 2 * GAP) + 22 * (-(-len(names) // 4)) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, panel in enumerate(panels):
        x = (number % columns) * (WIDTH + LEFT + GAP) + LEFT
        y = (number // columns) * (HEIGHT + TOP + 2 * GAP) + TOP
        parts += _panel(panel, x, y, colours, (x_title, y_title), most, x_label)
    for number, (name, colour) in enumerate(colours.items()):
        x, y = LEFT + (number % 4) * (width - LEFT) // 4, rows * (HEIGHT + TOP + 2 * GAP) + 22 * (number // 4) + 16
        parts.append(f'<line x1="{x}" x2="{x + 24}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 30}" y="{y}">{html.escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _reference_first(name: str) -> tuple[bool, str]:
    return name != "ab", name


def _panel(
    panel: Panel,
    x: int,
    y: int,
    colours: Mapping[str, str],
    axes: tuple[str, str],
    most: float,
    x_label: Callable[[float], str],
) -> list[str]:
    (title, lines), (x_title, y_title) = panel, axes
    points = [point for line in lines.values() for point in line]
    low_x, high_x = min(p[0] for p in points), max(p[0] for p in points)
    low_y = min(p[1] for p in points)
    high_y = min(max(p[1] for p in points), most)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = math.log(point[0] / low_x) / math.log(high_x / low_x)
        up = math.log(min(point[1], high_y) / low_y) / math.log(high_y / low_y)
        return round(x + across * WIDTH, 1), round(y + (1 - up) * HEIGHT, 1)

    parts = [
        f'<text x="{x}" y="{y - 10}" font-weight="bold">{html.escape(title)}</text>',
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#cccccc"/>',
        f'<text x="{x + WIDTH}" y="{y + HEIGHT + 32}" text-anchor="end" fill="#555555">{html.escape(x_title)}</text>',
        f'<text x="{x + WIDTH}" y="{y - 10}" text-anchor="end" fill="#555555">{html.escape(y_title)}</text>',
    ]
    for value in _decades(low_x, high_x):
        at = place((value, high_y))[0]
        parts.append(f'<line x1="{at}" x2="{at}" y1="{y}" y2="{y + HEIGHT}" stroke="#eeeeee"/>')
        parts.append(f'<text x="{at}" y="{y + HEIGHT + 16}" text-anchor="middle">{x_label(value)}</text>')
    for value in _decades(low_y, high_y):
        at = place((low_x, value))[1]
        parts.append(f'<line x1="{x}" x2="{x + WIDTH}" y1="{at}" y2="{at}" stroke="#eeeeee"/>')
        parts.append(f'<text x="{x - 6}" y="{at + 4}" text-anchor="end">{value:g}</text>')
    for name, line in lines.items():
        places = [place(point) for point in line]
        path = " ".join(f"{px},{py}" for px, py in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{px}" cy="{py}" r="2.6" fill="{colours[name]}"/>' for px, py in places]
    return parts


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten, and round numbers between them where few of those fit."""
    if high / low < 2:
        step = 10.0 ** math.floor(math.log10(high - low))
        return [round(n * step, 9) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    steps = (1, 1.5, 2, 3, 5, 7) if high / low < 10 else (1, 2, 5) if high / low < 100 else (1,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return [value for value in values if low <= value <= high]
