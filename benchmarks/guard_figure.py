"""The picture of `guard.py`: training loss around each fault, and all end losses, beside what clean seeds span."""

from __future__ import annotations

import math
import statistics
from itertools import chain
from pathlib import Path
from textwrap import fill
from typing import Any

from guard_faults import FAULT_STEP, NAMES, STEPS, Clean, Fault, Outcome, title_of

COLOURS = {"none": "#c1443c", "skip": "#2f6db5", "rollback": "#2e8b57"}
ROOM = 0.4
"""How far above the clean runs end losses are drawn in their places, in nats."""


def smoothed(outcome: Outcome, over: int = 9) -> list[float]:
    """Running median of the training loss, poisoned batches left out; NaN once there is one."""
    poisoned = outcome.fault.kind in ("one token", "random") and outcome.guard != "rollback"
    kept = [
        [] if poisoned and outcome.fault.at(step) else [loss]
        for step, loss in enumerate(outcome.losses, start=1)
    ]
    windows = [
        list(chain.from_iterable(kept[max(0, i - over + 1) : i + 1])) for i in range(len(kept))
    ]
    return [statistics.median(w) if all(map(math.isfinite, w)) else math.nan for w in windows]


def draw(clean: Clean, faulty: list[Outcome], file: Path) -> None:
    """Training loss around each fault, and all end losses, with what five clean seeds span in grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    faults = list(dict.fromkeys(outcome.fault for outcome in faulty))
    columns = 4
    rows = -(-len(faults) // columns)
    figure = pyplot.figure(figsize=(3.1 * columns, 2.6 * rows + 3.4), layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[*[1] * rows, 1.25])
    for place, fault in enumerate(faults):
        axes = figure.add_subplot(grid[divmod(place, columns)])
        own = [outcome for outcome in faulty if outcome.fault == fault]
        _draw_fault(axes, clean[fault.clip_norm], own, labelled=place == 0)
    _draw_ends(figure.add_subplot(grid[rows, :]), clean, faulty, faults)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _draw_fault(axes: Any, clean: list[Outcome], own: list[Outcome], labelled: bool) -> None:
    first = FAULT_STEP - 40
    curves = [smoothed(outcome)[first:] for outcome in clean]
    steps = range(first + 1, STEPS + 1)
    low, high = (list(map(end, zip(*curves, strict=True))) for end in (min, max))
    axes.fill_between(steps, low, high, color="#cccccc", label=f"clean, {len(clean)} seeds")
    for outcome in own:
        curve = smoothed(outcome)[first:]
        axes.plot(
            steps[: len(curve)],
            curve,
            color=COLOURS[outcome.guard],
            lw=1.4,
            label=NAMES[outcome.guard],
        )
    axes.axvline(own[0].fault.step, color="#444444", lw=0.7, ls=":")
    axes.set_title(title_of(own[0].fault), fontsize=9)
    axes.set_ylim(min(low) - 0.1, max(high) + 1.6)
    if labelled:
        axes.legend(fontsize=7, loc="upper left")
        axes.set_ylabel("training loss, running median")


def _draw_ends(axes: Any, clean: Clean, faulty: list[Outcome], faults: list[Fault]) -> None:
    for x, fault in enumerate(faults):
        ends = [outcome.end for outcome in clean[fault.clip_norm]]
        axes.fill_between((x - 0.4, x + 0.4), min(ends), max(ends), color="#cccccc", lw=0)
    top = max(run.end for runs in clean.values() for run in runs) + ROOM
    for outcome in faulty:
        x = faults.index(outcome.fault) + 0.18 * (list(NAMES).index(outcome.guard) - 1)
        there = outcome.end < top
        axes.plot(
            x,
            outcome.end if there else top,
            "o" if there else "^",
            color=COLOURS[outcome.guard],
            ms=7,
        )
        if not there:
            axes.annotate(f"  {outcome.end:.2f}", (x, top), fontsize=8, va="center")
    labels = [fill(title_of(fault), 15) for fault in faults]
    axes.set_xticks(range(len(faults)), labels, fontsize=8)
    axes.set_ylabel("held-out loss at the end")
    axes.set_title("end losses of the same runs; a triangle lies beyond the axis", fontsize=9)
