"""A simulated schedule as a picture: ranks as rows, time as the axis, in the manner of the report's Figure 5.

Forwards, input gradients, weight gradients and whole backwards differ in hue and in lightness, so that they can be
told apart in grey; the micro-batch's number stands in a box that has room for it; a bubble is white. In an
overlapped pair the forward lies above the backward, since the two run together. Where a rank holds two parts, work
of the second one (the way up in a V; in DualPipe the stage that is nearer to the output) has a black line at its edge.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.parallel.schedules import Action, Kind, Pair, Simulation, Span
from fathom.pictures import matplotlib, save_picture

COLOURS: dict[Kind, str] = {"F": "#fbe08a", "I": "#7dbdd4", "B": "#2f86a6", "W": "#24452f"}
"""From light to dark in grey: F, I, B, W."""
NAMES: dict[Kind, str] = {
    "F": "forward (F)",
    "I": "backward for the input (I)",
    "W": "backward for the weights (W)",
    "B": "whole backward (B)",
}
WHITE_NUMBERS: tuple[Kind, ...] = ("B", "W")
INK = "#1d2129"
WIDTHS = (9.0, 20.0)
ROW = 0.36
LEFT = 0.6
HALF = 0.38
FONT = 6.5
DIGIT = 0.062
"""Inches: least and largest width of a picture, a rank's row, the ranks' names, a digit (at `FONT` points).
`HALF` is half of a box's height, where rows are 1 apart."""


@dataclass(frozen=True, slots=True)
class _Box:
    action: Action
    left: float
    bottom: float
    width: float
    height: float


def draw_timeline(simulation: Simulation, path: str | Path, title: str | None = None) -> None:
    """Write the picture of a simulation into `path` (.png, .svg or .pdf).

    Raises `FathomError` without matplotlib, for an unknown suffix and where nothing can be written.
    """
    ranks = simulation.schedule.ranks
    room = DIGIT * len(str(simulation.schedule.microbatches - 1)) + 0.02
    width = _width(simulation, room)
    needed = room / (width - LEFT) * simulation.makespan
    size = (width, 1.05 + ROW * ranks)
    figure = matplotlib().figure.Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for rank, spans in enumerate(simulation.timeline):
        second = simulation.schedule.placement[rank][1:]
        for box in (box for span in spans for box in _boxes(span, rank)):
            _draw_box(axes, box, marked=box.action.part in second)
            if box.width >= needed:
                _write_number(axes, box)
    _dress(axes, simulation)
    axes.set_title(title or _title(simulation), loc="left", fontsize=10, color=INK)
    _add_legend(figure, simulation)
    save_picture(figure, path, dpi=110)


def _boxes(span: Span, rank: int) -> Iterator[_Box]:
    """A box, or for an overlapped pair the forward's above the backward's (the first rank is on top)."""
    width = span.end - span.start
    if isinstance(span.step, Pair):
        yield _Box(span.step.forward, span.start, rank - HALF, width, HALF)
        yield _Box(span.step.backward, span.start, rank, width, HALF)
    else:
        yield _Box(span.step, span.start, rank - HALF, width, 2 * HALF)


def _draw_box(axes: Any, box: _Box, marked: bool) -> None:
    place = [(box.left, box.width)]
    colour = COLOURS[box.action.kind]
    axes.broken_barh(
        place, (box.bottom, box.height), facecolor=colour, edgecolor=INK, linewidth=0.4
    )
    if marked:
        upper_half = box.height == HALF and box.bottom < round(box.bottom)
        edge = box.bottom - 0.09 if upper_half else box.bottom + box.height + 0.02
        axes.broken_barh(place, (edge, 0.07), facecolor=INK)


def _width(simulation: Simulation, room: float) -> float:
    """So wide that the narrowest box has `room` inches for its number, within `WIDTHS`."""
    spans = [span.end - span.start for spans in simulation.timeline for span in spans]
    narrowest = min((span for span in spans if span > 0), default=1.0)
    return min(max(LEFT + 1.02 * room * simulation.makespan / narrowest, WIDTHS[0]), WIDTHS[1])


def _write_number(axes: Any, box: _Box) -> None:
    number = str(box.action.microbatch)
    colour = "white" if box.action.kind in WHITE_NUMBERS else INK
    middle = (box.left + box.width / 2, box.bottom + box.height / 2 - 0.02)
    axes.text(*middle, number, ha="center", va="center_baseline", fontsize=FONT, color=colour)


def _dress(axes: Any, simulation: Simulation) -> None:
    ranks = simulation.schedule.ranks
    axes.set_xlim(0, simulation.makespan)
    axes.set_ylim(ranks - 0.4, -0.6)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)], fontsize=8)
    axes.tick_params(left=False, labelsize=8)
    axes.set_xlabel(
        "time (a forward of one stage takes 1)" if simulation.costs.forward == 1 else "time"
    )
    axes.xaxis.label.set_fontsize(8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _add_legend(figure: Any, simulation: Simulation) -> None:
    """The kinds of work that are drawn."""
    from matplotlib.patches import Patch

    plan = simulation.schedule
    drawn = {
        box.action.kind
        for rank, spans in enumerate(simulation.timeline)
        for s in spans
        for box in _boxes(s, rank)
    }
    patches = [
        Patch(facecolor=COLOURS[kind], edgecolor=INK, linewidth=0.4, label=name)
        for kind, name in NAMES.items()
        if kind in drawn
    ]
    if len(plan.placement[0]) > 1:
        patches.append(Patch(facecolor=INK, label="black line: the rank's second part"))
    figure.legend(
        handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False
    )


def _title(simulation: Simulation) -> str:
    plan = simulation.schedule
    most = max(simulation.peak_activations)
    return (
        f"{plan.name}: {plan.stages} stages on {plan.ranks} ranks, {plan.microbatches} micro-batches; "
        f"{simulation.bubble_fraction:.1%} idle, at most {most} activations on a rank"
    )
