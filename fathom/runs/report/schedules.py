"""The report's figures of what was set and what was read: schedules over tokens, sources of the data over steps."""

from __future__ import annotations

import tomllib
from collections import Counter
from typing import Any

import numpy as np

from fathom.runs.report.data import RunData
from fathom.runs.report.figure import FAINT, ONE, TEXT, WIDE, figure, finish
from fathom.runs.schedule_panels import HEIGHT, LABELS, Colours, Schedules, draw_panels
from fathom.runs.token_axis import TokenAxis, stages_of

MOST_BINS = 120
"""Columns of the mixture's figure; each is the mean over its steps."""
SOURCE_COLOURS = (
    "#2a5c99",
    "#c8501e",
    "#6b8f3c",
    "#8d6bb0",
    "#b98b1f",
    "#3f9a9a",
    "#a8506f",
    "#7d7f86",
)
"""One for each source; middle tones, which stand on light and on dark pages."""


def schedules_as_run(run: RunData) -> Schedules | None:
    """What held at each step, from the run's own log; None for a log that does not say at how many tokens."""
    lines = [line for line in run.metrics if line.get("tokens") and line.get("lr") is not None]
    if not lines:
        return None
    tokens = [float(line["tokens"]) for line in lines]
    names = [str(line.get("stage", "")) for line in lines]
    values = {k: [float(line[k]) for line in lines] for k in LABELS if all(k in x for x in lines)}
    if "batch" in values and "seq_len" in values:
        pairs = zip(values["batch"], values["seq_len"], strict=True)
        values["tokens_per_step"] = [batch * length for batch, length in pairs]
    axis = TokenAxis(stages_of(names, tokens), tokens[-1])
    return Schedules(axis, [0.0, *tokens], {key: [v[0], *v] for key, v in values.items()})


def schedules(found: Schedules) -> str:
    """The learning rate and all that changed, over tokens."""
    keys = found.changing()

    def draw(axes: Any) -> None:
        panels = list(np.atleast_1d(axes).flat)
        draw_panels(panels, found, keys, Colours(line=ONE, text=TEXT, border=FAINT))

    return figure(draw, (10.4, 1.4 + HEIGHT * len(keys)), "schedules", rows=len(keys))


def tokens_by_source(run: RunData) -> dict[str, int]:
    """Tokens that each source gave, the largest first; empty where the log does not tell."""
    found: Counter[str] = Counter()
    for line in run.metrics:
        for name, sequences in (line.get("sources") or {}).items():
            found[name] += sequences * line.get("seq_len", 1)
    return dict(found.most_common())


def tokens_asked(run: RunData) -> dict[str, float]:
    """Tokens that the weights of recipe or data ask of each source for the steps that were made; empty without."""
    recipe = _recipe(run)
    common = recipe.get("data", {}).get("weights") or run.manifest.get("weights") or {}
    stages = {stage.get("name"): stage.get("weights") for stage in recipe.get("stages", [])}
    found: Counter[str] = Counter()
    for line in run.metrics:
        weights = stages.get(line.get("stage")) or common
        tokens = sum((line.get("sources") or {}).values()) * line.get("seq_len", 1)
        for name, weight in weights.items():
            found[name] += tokens * weight / sum(weights.values())
    return dict(found)


def _recipe(run: RunData) -> dict[str, Any]:
    try:
        return tomllib.loads(run.recipe)
    except tomllib.TOMLDecodeError:
        return {}


def mixture(run: RunData) -> str:
    """Share of each source in the sequences of the steps, stacked."""
    lines = [line for line in run.metrics if line.get("sources")]
    names = list(tokens_by_source(run))
    parts = np.array_split(np.arange(len(lines)), min(len(lines), MOST_BINS))
    counts_NB = np.array(
        [[sum(lines[i]["sources"].get(name, 0) for i in part) for part in parts] for name in names]
    )
    edges = [lines[part[0]]["step"] - 0.5 for part in parts] + [lines[-1]["step"] + 0.5]
    tops_NB = np.cumsum(counts_NB / counts_NB.sum(0), axis=0)

    def draw(axes: Any) -> None:
        below = np.zeros(len(parts))
        for name, top, colour in zip(names, tops_NB, _colours(len(names)), strict=True):
            axes.stairs(top, edges, baseline=below, fill=True, color=colour, label=name, alpha=0.85)
            below = top
        axes.set_ylim(0, 1)
        axes.set_xlim(edges[0], edges[-1])
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.grid(False)
        finish(axes, run, "share of each source", legend=None, ink="#ffffff")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)

    return figure(draw, (WIDE[0], 3.4), "mixture")


def _colours(count: int) -> list[str]:
    return [SOURCE_COLOURS[number % len(SOURCE_COLOURS)] for number in range(count)]
