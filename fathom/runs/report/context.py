"""The report's figures of long context (report §4.3, Figure 8): loss by position, needles in a haystack."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fathom.runs.report.data import Line, RunData
from fathom.runs.report.figure import ONE, TEXT, TWO, colour_bar, figure, plain_ticks

COLUMNS = 3
MOST_WRITTEN = 90
"""Cells of a needle grid up to which each has its share written in it."""


def position_panels(run: RunData) -> list[tuple[str, list[Line]]]:
    """(stage, its lines) in the order of training, without what untrained weights give."""
    found: dict[str, list[Line]] = {}
    for line in run.positions:
        if line.get("step") and line.get("loss"):
            found.setdefault(str(line.get("stage", "")), []).append(line)
    return list(found.items())


def positions(run: RunData) -> str:
    """Held-out loss by tokens of context, a panel for each stage, before and after it."""
    panels = position_panels(run)

    def draw_one(number: int, axes: Any) -> None:
        stage, lines = panels[number]
        for line in lines:
            before = line.get("when") == "before"
            axes.stairs(
                line["loss"], np.array(line["edges"]) + 1, baseline=None,
                color=TWO if before else ONE, linewidth=1.8,
                linestyle=(0, (3, 2)) if before else "-", label=line.get("when"),
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: _tokens(value))
        axes.set_title(f"{stage}, {_tokens(lines[-1]['seq_len'])} tokens", color=TEXT)
        axes.set_xlabel("tokens of context")
        plain_ticks(axes)
        axes.legend()

    return _small_multiples(len(panels), draw_one, 2.9, "positions")


def needles(run: RunData) -> str:
    """Share of needles found by length of text and depth, a panel for each look."""
    lines = [line for line in run.needles if line.get("found")]
    stops = ["#b3341f", "#f0a860", "#f1efe9", "#8fb4d6", "#2a5c99"]

    def draw_one(number: int, axes: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        line = lines[number]
        found_DL = np.array(line["found"], dtype=float).T
        colours = LinearSegmentedColormap.from_list("found", stops)
        image = axes.imshow(found_DL, aspect="auto", cmap=colours, vmin=0, vmax=1)
        axes.grid(False)
        axes.set_xticks(range(len(line["lengths"])), [_tokens(n) for n in line["lengths"]])
        axes.set_yticks(range(len(line["depths"])), [f"{100 * d:.0f} %" for d in line["depths"]])
        if found_DL.size <= MOST_WRITTEN:
            _write_cells(axes, found_DL)
        axes.set_xlabel("tokens of text")
        axes.set_ylabel("depth")
        axes.set_title(_needle_title(line), color=TEXT)
        if number % COLUMNS == COLUMNS - 1 or number == len(lines) - 1:
            bar = colour_bar(image, axes)
            bar.set_ticks([0, 0.5, 1], labels=["0", "½", "1"])

    return _small_multiples(len(lines), draw_one, 3.4, "needles")


def _write_cells(axes: Any, found_DL: np.ndarray) -> None:
    """Each share in per cent, dark on pale and pale on dark cells."""
    for (depth, length), share in np.ndenumerate(found_DL):
        if math.isfinite(share):
            ink = "#ffffff" if share < 0.2 or share > 0.85 else "#1d2129"
            axes.text(
                length, depth, f"{100 * share:.0f}", ha="center", va="center", color=ink, fontsize=8
            )


def _needle_title(line: Line) -> str:
    cells = [share for row in line["found"] for share in row if math.isfinite(share)]
    mean = f", {100 * sum(cells) / len(cells):.0f} % found" if cells else ""
    return f"{line.get('when', '')} {line.get('stage', '')}".strip() + mean


def _small_multiples(
    count: int, draw_one: Callable[[int, Any], None], height: float, name: str
) -> str:
    """`count` panels, three in a row."""
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)

    def draw(axes: Any) -> None:
        panels = list(np.atleast_1d(axes).flat)
        for number, panel in enumerate(panels):
            if number < count:
                draw_one(number, panel)
            else:
                panel.set_axis_off()

    width = (5.4, 10.4, 10.4)[columns - 1]
    return figure(draw, (width, height * rows), name, rows, columns)


def _tokens(number: float) -> str:
    """Lengths as they are spoken of: 512, 4K, 128K."""
    if number >= 1024 and number % 1024 == 0:
        return f"{number / 1024:.0f}K"
    return f"{number:,.0f}"
