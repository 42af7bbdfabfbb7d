"""All schedules of a recipe over tokens, drawn before anything is run (`fathom run RECIPE --dry-run --plot FILE`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fathom.pictures import check_picture, matplotlib, save_picture
from fathom.runs.recipe import Recipe
from fathom.runs.schedule_panels import HEIGHT, LABELS, Colours, Schedules, draw_panels
from fathom.runs.token_axis import TokenAxis

INK = Colours(line="#2a5c99", text="#1d2129", border="#8b93a1")
SAMPLES = 200
"""Points of each curve between two marks."""


def draw_schedule(recipe: Recipe, path: str | Path) -> Path:
    """Draw learning rate, batch, length, γ, λ and α into a picture (.png, .svg or .pdf), and return its path.

    Raises `FathomError` when matplotlib is missing or the file cannot be written.
    """
    check_picture(path)
    path, found = Path(path), schedules_of(recipe)
    with matplotlib().rc_context(_style()):
        size = (10.4, 0.9 + HEIGHT * len(LABELS))
        drawing = matplotlib().figure.Figure(figsize=size, layout="constrained")
        axes = drawing.subplots(len(LABELS), 1)
        draw_panels(axes, found, list(LABELS), INK)
        drawing.suptitle(f"{recipe.name}: schedules over tokens", x=0.01, ha="left", fontsize=12)
        save_picture(drawing, path, dpi=144)
    return path


def schedules_of(recipe: Recipe) -> Schedules:
    """What holds from the first token to the last, densely enough that each mark is met."""
    stages = tuple((float(span.begins), span.stage.name) for span in recipe.spans)
    axis = TokenAxis(stages, float(recipe.total_tokens), tuple(_marks(recipe)))
    tokens = axis.samples(SAMPLES).tolist()
    moments = [recipe.at(tokens=t) for t in tokens]
    values: dict[str, list[float]] = {
        key: [float(getattr(moment, key)) for moment in moments]
        for key in LABELS
        if key != "tokens_per_step"
    }
    values["tokens_per_step"] = [float(m.batch * m.seq_len) for m in moments]
    return Schedules(axis, tokens, values)


def _marks(recipe: Recipe) -> list[float]:
    """Where warm-ups and batch ramps end, in tokens."""
    found: list[float] = []
    for span in recipe.spans:
        stage = span.stage
        if stage.warmup_steps:
            found.append(float(span.tokens_at(span.first_step + stage.warmup_steps)))
        if stage.batch_ramp_tokens:
            found.append(float(span.begins + stage.batch_ramp_tokens))
    return found


def _style() -> dict[str, Any]:
    return {
        "font.size": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK.border,
        "xtick.color": INK.border,
        "ytick.color": INK.border,
        "xtick.labelcolor": INK.text,
        "ytick.labelcolor": INK.text,
        "axes.grid": True,
        "grid.color": "#e6e4de",
        "axes.axisbelow": True,
        "svg.fonttype": "none",
    }
