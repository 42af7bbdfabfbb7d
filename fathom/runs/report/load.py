"""The report's figures of the experts' load."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fathom.runs.report.data import RunData, even
from fathom.runs.report.figure import HALF, ONE, TEXT, TWO, colour_bar, figure, finish, two_lines

ON_PALE = "#1d2129"
"""Ink of letters on an image, whose colours do not change with the page."""
MOST_BLOCKS = 9
"""Blocks of which the report draws every expert."""


def balance(run: RunData, wide: bool) -> str:
    """Load of the busiest expert over the mean load: the worst block at each step, and the ideal."""

    def draw(axes: Any) -> None:
        two_lines(axes, run, "max_load", ONE, "worst block")
        axes.axhline(1.0, color=TWO, linewidth=1.6, linestyle=(0, (4, 3)), label="ideal")
        axes.set_ylim(bottom=0.9)
        finish(axes, run, "busiest expert / mean load", legend="best")

    return figure(draw, (10.4, 3.6) if wide else HALF, "balance")


def bias_range(run: RunData) -> str:
    """Smallest and largest router bias."""

    def draw(axes: Any) -> None:
        steps, low, high = run.bias_range()
        axes.fill_between(steps, low, high, color=ONE, alpha=0.25, linewidth=0)
        for edge in (low, high):
            axes.plot(steps, edge, color=ONE, linewidth=1.6)
        finish(axes, run, "router bias, smallest to largest", legend=None)

    return figure(draw, HALF, "bias")


def _colours() -> Any:
    """Below the mean blue, at the mean pale, above it orange to red; told apart by colour-blind readers too."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = ["#2a5c99", "#8fb4d6", "#f1efe9", "#f0a860", "#b3341f"]
    return LinearSegmentedColormap.from_list("load", stops)


def block_heat_map(run: RunData) -> str:
    """max/mean load of every MoE block (rows) over steps (columns)."""
    lines = [line for line in run.metrics if line.get("expert_load")]
    width = min(len(lines), 400)
    groups = np.array_split(np.array(even([line["expert_load"] for line in lines])), width)
    image_MS = np.stack([group.mean(0) for group in groups], axis=1)
    blocks = image_MS.shape[0]

    def draw(axes: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        colours = LinearSegmentedColormap.from_list(
            "excess", ["#f1efe9", "#f0a860", "#b3341f", "#5d0f16"]
        )
        shown = axes.imshow(
            image_MS, aspect="auto", interpolation="nearest", cmap=colours, vmin=1,
            vmax=max(2.0, float(np.nanquantile(image_MS, 0.98))),
            extent=(lines[0]["step"], lines[-1]["step"] + 1, blocks + 0.5, 0.5),
        )  # fmt: skip
        axes.grid(False)
        axes.set_yticks(range(1, blocks + 1, max(1, math.ceil(blocks / 16))))
        axes.set_ylabel("MoE block")
        colour_bar(shown, axes)
        finish(axes, run, "busiest expert / mean load", legend=None, ink=ON_PALE)

    return figure(draw, (10.4, 1.6 + 0.24 * min(blocks, 16)), "blocks")


def chosen_blocks(count: int) -> list[int]:
    """At most `MOST_BLOCKS` block numbers, evenly spread from the first to the last."""
    if count <= MOST_BLOCKS:
        return list(range(count))
    return [round(i * (count - 1) / (MOST_BLOCKS - 1)) for i in range(MOST_BLOCKS)]


def expert_heat_maps(run: RunData) -> str:
    """Every expert's share over time, one panel per MoE block: load over mean load, on a logarithmic colour scale."""
    loads_SME = np.array(even([line["load"] for line in run.loads]), dtype=float)
    shares = loads_SME / np.maximum(loads_SME.mean(-1, keepdims=True), 1e-9)
    steps = [line["step"] for line in run.loads]
    blocks = chosen_blocks(shares.shape[1])
    columns = min(3, len(blocks))
    rows = math.ceil(len(blocks) / columns)

    def draw(axes: Any) -> None:
        panels = list(np.atleast_1d(axes).flat)
        for panel in panels[len(blocks) :]:
            panel.set_axis_off()
        for panel, block in zip(panels, blocks, strict=False):
            octaves = np.log2(np.maximum(shares[:, block].T, 1 / 4))
            image = panel.imshow(
                octaves, aspect="auto", interpolation="nearest", cmap=_colours(), vmin=-2, vmax=2,
                extent=(steps[0], steps[-1] + 1, shares.shape[2] - 0.5, -0.5),
            )  # fmt: skip
            panel.grid(False)
            panel.set_title(f"block {block + 1}", color=TEXT)
        for panel in panels[::columns]:
            panel.set_ylabel("expert")
        for panel in panels[max(0, len(blocks) - columns) : len(blocks)]:
            panel.set_xlabel("step")
        bar = colour_bar(image, panels)
        bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])
        bar.set_label("load / mean")

    return figure(draw, (10.4, 0.5 + 2.0 * rows), "experts", rows, columns)
