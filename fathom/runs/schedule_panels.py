"""All that a schedule sets (report §4.2, §4.3), one panel under another over one axis of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fathom.planning.describe import human
from fathom.runs.token_axis import TokenAxis, border_stages, name_stages

LABELS = {
    "lr": "learning rate",
    "batch": "sequences in a step",
    "tokens_per_step": "tokens in a step",
    "seq_len": "tokens in a sequence",
    "gamma": "γ, speed of router biases",
    "mtp_weight": "λ, weight of the MTP loss",
}
POWERS = ("batch", "tokens_per_step", "seq_len")
"""Quantities on a logarithmic axis."""
HEIGHT = 1.25
"""Inches of a panel."""


@dataclass(frozen=True)
class Colours:
    """Ink of the drawing: on a page they are stand-ins for the page's own."""

    line: str
    text: str
    border: str


@dataclass(frozen=True)
class Schedules:
    """What held up to each of `tokens`, by the keys of `LABELS`."""

    axis: TokenAxis
    tokens: Sequence[float]
    values: Mapping[str, Sequence[float]]

    def changing(self) -> list[str]:
        """The learning rate, and whatever else did not stay the same."""
        return [
            k for k in LABELS if k in self.values and (k == "lr" or len(set(self.values[k])) > 1)
        ]


def draw_panels(panels: Sequence[Any], found: Schedules, keys: Sequence[str], ink: Colours) -> None:
    """One of `keys` in each of `panels`, from the top."""
    for panel, key in zip(panels, keys, strict=True):
        panel.plot(
            found.tokens, found.values[key], color=ink.line, linewidth=1.8, drawstyle="steps-pre"
        )
        _scale(panel, key, found.values[key])
        found.axis.apply(panel, labels=panel is panels[-1])
        border_stages(panel, found.axis, ink.border)
        names_above = panel is panels[0] and len(found.axis.stages) > 1
        panel.set_title(LABELS[key], color=ink.text, fontsize=10, pad=38 if names_above else 3)
    name_stages(panels[0], found.axis, ink.text)
    scale = "" if found.axis.is_plain else " (short stretches are drawn wider)"
    panels[-1].set_xlabel(f"tokens trained on{scale}")


def _scale(panel: Any, key: str, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if key in POWERS and min(values) > 0:
        panel.set_yscale("log", base=2)
        panel.set_ylim(min(values) / 1.3, max(values) * 1.3)
        panel.yaxis.set_major_locator(FixedLocator(_apart(values)))
        panel.yaxis.set_minor_locator(NullLocator())
        in_tokens = key == "tokens_per_step"
        panel.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: human(value, 4) if in_tokens else f"{value:,.0f}")
        )
        return
    panel.set_ylim(bottom=0, top=1.12 * max(values) or 1)
    panel.locator_params(axis="y", nbins=4)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _apart(values: Sequence[float]) -> list[float]:
    """Values that held, the smallest, the largest, then the longest held, with room for a label at each."""
    held = Counter(values)
    room = (max(values) / min(values)) ** 0.25
    found = [min(values)]
    for value in (max(values), *(value for value, _ in held.most_common())):
        if all(max(value / other, other / value) > max(room, 1.01) for other in found):
            found.append(value)
    return found
