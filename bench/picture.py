"""A bar chart as SVG: nbdmap's ratio to nbdkit, a bar a row, and a mark where issue 3 wants it to be.

No background, and colours of middling lightness, so that it reads on a light page and on a dark one.
"""

from collections.abc import Sequence
from html import escape
from typing import Final

from bench.measure import Result

LABEL_WIDTH: Final = 300
BAR_WIDTH: Final = 400
RIGHT: Final = 60
ROW: Final = 22
TOP: Final = 46
BOTTOM: Final = 26
INK: Final = "#7d8590"
BAR: Final = "#3f8ae0"
MARK: Final = "#d97706"


def _step(most: float) -> float:
    """The distance of the lines: at most eight of them."""
    return next(step for step in (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 50.0, 1e9) if most / step <= 8)


def svg(results: Sequence[Result], transport: str = "unix") -> str:
    """The chart of the rows over one transport in which nbdmap stands beside nbdkit."""
    rows = [
        (result, ratio)
        for result in results
        if result.transport == transport and result.baseline == "nbdkit" and (ratio := result.ratio("nbdkit")) is not None
    ]
    most = max([1.0, *(max(ratio, result.at_least or 0.0) for result, ratio in rows)]) * 1.04
    width, height = LABEL_WIDTH + BAR_WIDTH + RIGHT, TOP + ROW * len(rows) + BOTTOM
    title = f"nbdmap's speed as a multiple of nbdkit's, {transport} socket"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}" role="img" aria-label="{title}">',
        f'<text x="8" y="18" font-size="14" font-weight="600">{title}</text>',
        f'<path d="M{LABEL_WIDTH} 28v10" stroke="{MARK}" stroke-width="3"/>',
        f'<text x="{LABEL_WIDTH + 8}" y="37">wanted (issue 3)</text>',
        *_scale(most, height),
        *(part for number, (result, ratio) in enumerate(rows) for part in _bar(number, result, ratio, most)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _at(value: float, most: float) -> float:
    return round(LABEL_WIDTH + BAR_WIDTH * value / most, 1)


def _scale(most: float, height: int) -> list[str]:
    """Vertical lines; that of 1, where both are as fast, is the strong one."""
    step = _step(most)
    values = {round(number * step, 2) for number in range(int(most / step) + 1)} | {1.0}
    parts = []
    for value in sorted(values):
        x = _at(value, most)
        strong = "" if value == 1.0 else ' stroke-opacity="0.3"'
        parts.append(f'<path d="M{x} {TOP - 4}V{height - BOTTOM + 4}" stroke="{INK}"{strong}/>')
        if value == 1.0 or abs(value - 1.0) * BAR_WIDTH / most > 24:
            parts.append(f'<text x="{x}" y="{height - 8}" text-anchor="middle">{value:g}</text>')
    return parts


def _bar(number: int, result: Result, ratio: float, most: float) -> list[str]:
    y = TOP + ROW * number
    middle = y + ROW / 2 + 4
    end = _at(ratio, most)
    parts = [
        f'<text x="{LABEL_WIDTH - 8}" y="{middle}" text-anchor="end">{escape(result.text)}</text>',
        f'<rect x="{LABEL_WIDTH}" y="{y + 4}" width="{round(end - LABEL_WIDTH, 1)}" height="{ROW - 8}" fill="{BAR}"/>',
        f'<text x="{max(end, _at(result.at_least or 0.0, most)) + 6}" y="{middle}">{ratio:.2f}</text>',
    ]
    if result.at_least is not None:
        parts.append(f'<path d="M{_at(result.at_least, most)} {y + 1}v{ROW - 2}" stroke="{MARK}" stroke-width="3"/>')
    return parts
