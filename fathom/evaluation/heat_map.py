"""A needle grid as a picture: depth over length, the share found as shade and number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fathom.evaluation.needle import Grid
from fathom.pictures import matplotlib, save_picture

SHADES = "YlGnBu"
DARK_ABOVE = 0.55
"""Share above which a shade is so dark that white numbers read better."""


def draw(titled: Sequence[tuple[str, Grid]], path: str | Path, columns: int = 2) -> None:
    """Write one panel for each grid into `path`, in the format that its suffix names (.png, .svg, .pdf).

    Raises `FathomError` without matplotlib, for an unknown suffix and where nothing can be written.
    """
    columns = min(columns, len(titled))
    rows = -(-len(titled) // columns)
    size = (0.6 + 5.2 * columns, 0.4 + 3.4 * rows)
    figure = matplotlib().figure.Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, grid) in zip(axes, titled, strict=False):
        _panel(axis, title, grid)
    for axis in axes[len(titled) :]:
        axis.set_axis_off()
    save_picture(figure, path, dpi=110)


def _panel(axis: Any, title: str, grid: Grid) -> None:
    axis.imshow(list(zip(*grid.found, strict=True)), vmin=0, vmax=1, cmap=SHADES, aspect="auto")
    axis.set_xticks(range(len(grid.lengths)), [f"{length:,}" for length in grid.lengths])
    axis.set_yticks(range(len(grid.depths)), [f"{depth:.0%}" for depth in grid.depths])
    axis.set_xlabel("length in tokens")
    axis.set_ylabel("depth of the needle")
    axis.set_title(title, loc="left", fontsize=10)
    for x, row in enumerate(grid.found):
        for y, share in enumerate(row):
            dark = share > DARK_ABOVE
            colour = "white" if dark else "black"
            axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", color=colour, size=8)
