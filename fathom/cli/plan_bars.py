"""Stacked bars as SVG, in the colours of the page that they stand in."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

ROW, LEFT, WIDTH, RIGHT = 46, 190, 650, 170
"""Height of a bar with its margin; room for names, for the longest bar, and for what is written behind it."""
INKS = ("var(--one)", "var(--two)", "var(--three)", "var(--soft)")
"""Colours of a bar's parts, in turn; a second round is paler."""


def bars(rows: Sequence[tuple[str, dict[str, float], str]], full: float, marks: str = "") -> str:
    """Stacked bars as an SVG: (name, parts, total in words); `full` is the length of the axis."""
    height, left, width, right = ROW, LEFT, WIDTH, RIGHT
    keys = list(dict.fromkeys(key for _, parts, _ in rows for key in parts))
    legend = _legend(keys, left, len(rows) * height + 30, width + right)
    total = len(rows) * height + 40 + 24 * legend[1]
    shapes = []
    for number, (name, parts, text) in enumerate(rows):
        top, x = number * height + 8, float(left)
        shapes.append(
            f'<text x="{left - 12}" y="{top + 19}" text-anchor="end" fill="var(--ink)">{escape(name)}</text>'
        )
        for key, size in parts.items():
            long = width * size / full
            shapes.append(
                f'<rect x="{x:.1f}" y="{top}" width="{long:.1f}" height="28" {_ink(keys.index(key))}>'
                f"<title>{escape(key)}</title></rect>"
            )
            x += long
        shapes.append(
            f'<text x="{x + 8:.1f}" y="{top + 19}" fill="var(--soft)" stroke="var(--card)" stroke-width="5" '
            f'paint-order="stroke">{escape(text)}</text>'
        )
    return (
        f'<svg viewBox="0 0 {left + width + right} {total}" role="img" font-size="14" font-family="var(--font)">'
        f"{marks}{''.join(shapes)}{legend[0]}</svg>"
    )


def _ink(number: int) -> str:
    paler = 0.45 if number >= len(INKS) else 1
    return f'fill="{INKS[number % len(INKS)]}" fill-opacity="{paler}"'


def _legend(keys: Sequence[str], left: int, top: int, width: int) -> tuple[str, int]:
    """Swatches with names, and how many rows they take."""
    x, row, found = 0.0, 0, []
    for number, key in enumerate(keys):
        long = 26 + 7.6 * len(key)
        if x + long > width:
            x, row = 0.0, row + 1
        y = top + 24 * row
        found.append(
            f'<rect x="{left + x:.0f}" y="{y - 11}" width="12" height="12" {_ink(number)}/>'
            f'<text x="{left + x + 18:.0f}" y="{y}" fill="var(--soft)">{escape(key)}</text>'
        )
        x += long + 10
    return "".join(found), row + 1
