"""The frame of the report's figures: matplotlib drawings as SVG text that takes its ink from the page, so that dark
mode works.

Lines and letters are drawn in stand-in colours, which become CSS variables in the SVG; letters stay letters.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from fathom.pictures import matplotlib
from fathom.runs.report.data import RunData

INK = {
    "#010101": "var(--ink)",
    "#020202": "var(--faint)",
    "#030303": "var(--grid)",
    "#040404": "var(--one)",
    "#050505": "var(--two)",
    "#060606": "var(--three)",
}
"""Stand-in colours of the drawings and what the page makes of them."""
TEXT, FAINT, GRID, ONE, TWO, THREE = INK
WIDE, HALF = (10.4, 4.4), (5.4, 3.3)
"""Sizes of figures in inches, by their share of the page's width."""


def style() -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.labelsize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": TEXT,
        "text.color": TEXT,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": TEXT,
        "ytick.labelcolor": TEXT,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": 11,
        "legend.handlelength": 1.4,
        "figure.constrained_layout.use": True,
    }


def figure(
    draw: Callable[[Any], None],
    size: tuple[float, float],
    name: str,
    rows: int = 1,
    columns: int = 1,
) -> str:
    """SVG text of a drawing; `name` keeps its ids apart from those of other figures in the page."""
    with matplotlib().rc_context({**style(), "svg.hashsalt": name}):
        drawing = matplotlib().figure.Figure(figsize=size)
        axes = drawing.subplots(rows, columns, squeeze=False)
        draw(axes if rows * columns > 1 else axes[0, 0])
        out = io.StringIO()
        drawing.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """The <svg> element alone, in the page's colours and fonts, without fixed size, its ids its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', svg, count=1)
    svg = re.sub(r"(font: [^;\"]*?px )[^;\"]*", r"\1inherit-font", svg).replace(
        "inherit-font", "var(--font)"
    )
    svg = re.sub(r'(<image[^>]*?) id="[^"]*"', r"\1", svg)  # equal images would share one
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    for stand_in, variable in INK.items():
        svg = svg.replace(stand_in, variable)
    return svg


def smoothed(values: list[float], share: float = 0.02) -> np.ndarray:
    """Centred moving average over about a `share` of the points, over fewer at the ends."""
    reach = int(share * len(values) / 2)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    middle = np.arange(len(values))
    low, high = np.maximum(middle - reach, 0), np.minimum(middle + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def two_lines(axes: Any, run: RunData, key: str, color: str, label: str) -> None:
    """A metric over steps: every value pale, the mean around it strong."""
    steps, values = run.series(key)
    if not steps:
        return
    axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.28)
    axes.plot(steps, smoothed(values), color=color, linewidth=2, label=label)


def finish(
    axes: Any, run: RunData, label: str, legend: str | None = "upper right", ink: str = TEXT
) -> None:
    """Title, axis of steps, borders of stages with their names in `ink`, legend."""
    axes.set_title(label, color=TEXT)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=6)
    axes.margins(x=0.01)
    _mark_stages(axes, run, ink)
    if legend and axes.get_legend_handles_labels()[0]:
        below_names = 0.88 if len(run.stages()) > 1 else 1.0
        axes.legend(loc=legend, bbox_to_anchor=(0, 0, 1, below_names))


def _mark_stages(axes: Any, run: RunData, ink: str) -> None:
    """A dotted line and a name where each stage begins; a name that would run into another goes a line lower."""
    stages = run.stages()
    low, high = axes.get_xlim()
    inch = (high - low) / axes.figure.get_size_inches()[0]
    ends: list[float] = []
    for step, name in stages if len(stages) > 1 else []:
        axes.axvline(step, color=FAINT, linewidth=0.8, linestyle=(0, (2, 3)))
        width = (0.1 + 0.075 * len(name)) * inch
        start = max(min(step, high - width), low)
        row = next((i for i, end in enumerate(ends) if end <= start), len(ends))
        ends[row : row + 1] = [start + width]
        axes.annotate(
            f" {name}", (start, 1.0), xycoords=axes.get_xaxis_transform(), xytext=(0, -11 * row),
            textcoords="offset points", va="top", fontsize=9, color=ink,
        )  # fmt: skip


def plain_ticks(axes: Any) -> None:
    """Numbers written out; on a logarithmic axis 1, 2, 3, 5 of every decade, or evenly when there is less than one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        narrow = high < 5 * low
        axes.yaxis.set_major_locator(MaxNLocator(5) if narrow else LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def colour_bar(image: Any, axes: Any) -> Any:
    """The scale of colours beside an image, or beside all the panels that share it."""
    bar = image.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.045, aspect=28)
    bar.outline.set_visible(False)
    return bar
