"""The report's curves over steps: loss, gradient norm, speed."""

from __future__ import annotations

from typing import Any

from fathom.runs.report.data import Line, RunData, series
from fathom.runs.report.figure import (
    HALF,
    ONE,
    THREE,
    TWO,
    WIDE,
    figure,
    finish,
    plain_ticks,
    two_lines,
)


def loss(run: RunData) -> str:
    """Training loss, held-out loss and MTP loss over steps."""

    def draw(axes: Any) -> None:
        two_lines(axes, run, "mtp_loss", THREE, "MTP")
        two_lines(axes, run, "loss", ONE, "training")
        part, whole = run.evals_by_coverage()
        kinds = [(part, "o-", "held out, a part"), (whole, "D", "held out, all")]
        for lines, form, label in kinds if part else [(whole, "o-", "held out")]:
            if lines:
                points = series(lines, "loss")
                axes.plot(*points, form, color=TWO, linewidth=1.6, markersize=5, label=label)
            _average(axes, lines, form, f"{label}, averaged weights")
        axes.set_yscale("log")
        plain_ticks(axes)
        _mark_spikes(axes, run)
        finish(axes, run, "loss, nats per token (logarithmic axis)", legend="lower left")

    return figure(draw, WIDE, "loss")


def _average(axes: Any, lines: list[Line], form: str, label: str) -> None:
    """Held-out loss of the average of the weights: the marks of the weights' own, hollow."""
    steps, losses = series(lines, "ema_loss")
    if steps:
        axes.plot(
            steps, losses, form, color=TWO, markerfacecolor="none", linewidth=0.9, markersize=6, label=label
        )  # fmt: skip


def _mark_spikes(axes: Any, run: RunData) -> None:
    """A triangle at the top for each step that the guard acted on (full) or remarked on (empty)."""
    for acted, face in ((True, TWO), (False, "none")):
        steps = [s["step"] for s in run.spikes if (s.get("action") != "record") is acted]
        axes.plot(
            steps, [0.985] * len(steps), "v", transform=axes.get_xaxis_transform(), color=TWO,
            markerfacecolor=face, markersize=6, clip_on=False,
        )  # fmt: skip


def grad_norm(run: RunData) -> str:
    """Gradient norm before clipping, on a logarithmic axis."""

    def draw(axes: Any) -> None:
        two_lines(axes, run, "grad_norm", ONE, "")
        if any(value > 0 for value in run.series("grad_norm")[1]):
            axes.set_yscale("log")
        plain_ticks(axes)
        finish(axes, run, "gradient norm before clipping", legend=None)

    return figure(draw, HALF, "grad")


def speed(run: RunData) -> str:
    """Tokens per second."""

    def draw(axes: Any) -> None:
        two_lines(axes, run, "tokens_per_second", ONE, "")
        axes.set_ylim(bottom=0)
        plain_ticks(axes)
        finish(axes, run, "tokens per second", legend=None)

    return figure(draw, HALF, "speed")
