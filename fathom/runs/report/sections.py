"""The report's sections on what was set, what was read, what went wrong, and how far the model sees."""

from __future__ import annotations

from typing import Any

from fathom.planning.describe import human
from fathom.runs.report import context as pictures
from fathom.runs.report import schedules as drawn
from fathom.runs.report.data import Line, RunData
from fathom.runs.report.html import details, framed, rows_table

SKIPPED = ("skip", "rollback")
"""Actions of the guard after which nothing is learnt from a step."""
FEW_SPIKES, MOST_SPIKES = 12, 200
"""Lines of the table of spikes up to which it is unfolded, and which it has at most."""


def schedules(run: RunData) -> str:
    """The learning rate and what else changed, over tokens."""
    found = drawn.schedules_as_run(run)
    if found is None:
        return ""
    same = [f"{k} = {v[0]:g}" for k, v in found.values.items() if k not in found.changing()]
    caption = "As they were run, from the log of each step."
    if same:
        caption += f" Unchanged throughout: {', '.join(same)}."
    return f"<h2>Schedules</h2>{framed(drawn.schedules(found), caption, wide=True)}"


def spikes(run: RunData) -> str:
    """What the guard saw and did, step by step, with the data that each step saw."""
    if not run.spikes:
        return ""
    counts = [
        f"{sum(line.get('action') == action for line in run.spikes):,} {word}"
        for action, word in (
            ("skip", "skipped"),
            ("rollback", "rolled back"),
            ("record", "only remarked on"),
        )
    ]
    headings = ("step", "stage", "action", "why", "loss (z)", "gradient norm (z)", "data it saw")
    shown = run.spikes[-MOST_SPIKES:]
    table = rows_table(headings, [_spike(line) for line in shown])
    remark = (
        f"the last {len(shown):,} of {len(run.spikes):,}" if len(shown) < len(run.spikes) else "all"
    )
    return (
        "<h2>Spikes</h2><p>A step whose loss or gradient norm lies far outside of those before it (z is its robust "
        f"z-score) is not learnt from, if the recipe says so: {', '.join(counts)}.</p>"
        f"{details('Steps', remark, table, unfolded=len(shown) <= FEW_SPIKES)}"
    )


def _spike(line: Line) -> tuple[str, ...]:
    data = line.get("data") or {}
    return (
        f"{line.get('step', 0):,}",
        str(line.get("stage", "")),
        _action(line),
        str(line.get("reason", "")),
        _with_z(line.get("loss"), line.get("loss_z")),
        _with_z(line.get("grad_norm"), line.get("grad_norm_z")),
        _data(data),
    )


def _action(line: Line) -> str:
    text = str(line.get("action", ""))
    if "to" not in line:
        return text
    return f"{text} to step {line['to']:,}, {line.get('passed_over', 0):,} sequences passed over"


def _with_z(value: Any, z: Any) -> str:
    text = "not finite" if value is None else f"{value:.4g}"
    return text if z is None else f"{text} ({z:+.1f})"


def _data(data: Line) -> str:
    """Which sequences of the stage's stream, and from where."""
    if "first_sequence" not in data:
        return ""
    first, count = data["first_sequence"], data.get("count", 1)
    sources = ", ".join(f"{number} {name}" for name, number in (data.get("sources") or {}).items())
    return f"sequences {first:,} to {first + count - 1:,}" + (f": {sources}" if sources else "")


def data_seen(run: RunData) -> str:
    """The mixture as it was seen, beside the one that was asked for."""
    tokens = drawn.tokens_by_source(run)
    if len(tokens) < 2:
        return ""
    asked, whole = drawn.tokens_asked(run), sum(tokens.values())
    rows = [
        (
            name,
            human(count, 4),
            f"{100 * count / whole:.2f} %",
            f"{100 * asked[name] / whole:.2f} %" if name in asked else "by size",
        )
        for name, count in tokens.items()
    ]
    table = rows_table(("source", "tokens seen", "share", "asked for"), rows)
    caption = (
        "Share of each source in the sequences of the steps, as they were really read; every column is a mean over "
        "the steps in it."
    )
    figure = framed(drawn.mixture(run), caption, wide=True)
    return f"<h2>Data seen</h2>{figure}<figure>{table}</figure>"


def context(run: RunData) -> str:
    """Loss by position and needle grids, where the run looked."""
    parts = []
    if pictures.position_panels(run):
        parts.append(
            framed(
                pictures.positions(run),
                "Held-out loss by how many tokens a position has before it, itself included, in buckets that double. "
                "Dashed: as the weights came into the stage, already with its length and rotary settings; solid: as "
                "they left it. A curve that goes on falling to the right is a model that uses its context; one that "
                "rises has not learnt these distances.",
                wide=True,
            )
        )
    if any(line.get("found") for line in run.needles):
        parts.append(
            framed(
                pictures.needles(run),
                "A needle in a haystack (report, Figure 8): how often, in per cent, the model found what was hidden "
                "at some depth (0 % is the beginning) of a text of some length.",
                wide=True,
            )
        )
    return f"<h2>Context</h2>{''.join(parts)}" if parts else ""
